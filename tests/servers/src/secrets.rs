//! Secrets for a secured server and its clients: certificates from a test authority, and a password.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// The user of secured servers.
pub const USER: &str = "penstock";

pub struct Secrets {
    /// The folder of the files.
    pub folder: PathBuf,
    /// The password of [`USER`].
    pub password: String,
    /// The authority that signed the server's certificate.
    pub ca: PathBuf,
    /// An unrelated authority.
    pub other_ca: PathBuf,
    /// A client certificate, signed by [`Self::ca`].
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Secrets {
    /// Generates and writes the files, for a server on 127.0.0.1.
    pub(crate) fn write(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let password = crate::unique("password-");
        write("user", &format!("{USER} {password}\n"));
        let (issuer, ca) = authority("Penstock's tests");
        let (_, other) = authority("Somebody else");
        let server = certificate(&issuer, &["127.0.0.1", "localhost"]);
        write("server.crt", &server.certificate);
        write("server.key", &server.key);
        write(
            "server.pem",
            &format!("{}{}", server.key, server.certificate),
        );
        let client = certificate(&issuer, &[USER]);
        Self {
            folder: folder.to_owned(),
            password,
            ca: write("ca.pem", &ca),
            other_ca: write("other-ca.pem", &other),
            certificate: write("client.crt", &client.certificate),
            key: write("client.key", &client.key),
        }
    }
}

struct CertificateAndKey {
    certificate: String,
    key: String,
}

fn authority(name: &str) -> (Issuer<'static, KeyPair>, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).unwrap().pem();
    (Issuer::new(params, key), certificate)
}

fn certificate(authority: &Issuer<'_, KeyPair>, names: &[&str]) -> CertificateAndKey {
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, USER);
    let certificate = params.signed_by(&key, authority).unwrap().pem();
    CertificateAndKey {
        certificate,
        key: key.serialize_pem(),
    }
}
