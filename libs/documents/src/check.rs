//! Validation that needs nothing but the document. Reports every fault, not only the first; each message
//! says what to do.

use contract::problem::{Finding, escape};
use contract::resources::limits::{
    self, ARGUMENT_BYTES_MAX, CONCURRENT_REQUESTS_MAX, DURATION_MAX, ENV_MAX, ENV_VALUE_BYTES_MAX,
    INSTANCE_TYPE_BYTES_MAX, KEEP_ALIVE_IDLE_MAX, LABEL_BYTES_MAX, LABELS_MAX,
    PROBE_PATH_BYTES_MAX, PROBE_PERIOD_MIN, PROBE_SERVICE_BYTES_MAX, PROBE_SPAN_MAX,
    PROBE_THRESHOLD_MAX, QUEUE_WAIT_MAX, REQUEST_BYTES_MAX, RESERVED_ENV_PREFIX,
    ROUTE_PATH_BYTES_MAX, SPEC_BYTES_MAX, STARTUP_TIMEOUT_MIN, TERMINATION_GRACE_MAX,
    TERMINATION_GRACE_MIN, TIMEOUT_MAX,
};
use contract::resources::{
    DeploymentSpec, EndpointSpec, EnvValue, Labels, ProbeProtocol, ProbeSpec, RequestSettings,
    Resource,
};
use contract::time::Span;
use serde_json::Value;

pub mod backends;

use backends::Backends;

/// Why a share of mirrored traffic is refused. Remove this once gateways mirror requests.
pub const MIRROR_UNSUPPORTED: &str =
    "requests are not copied to other deployments yet: leave `mirror` out, or set the share to 0";

/// Returns everything that is wrong with a resource, except what only the engine can check. Without
/// `backends`, the rules of the deployment's backend are not checked.
pub fn resource(resource: &Resource, backends: Option<&Backends>) -> Vec<Finding> {
    let mut checker = Checker::default();
    checker.labels(resource.labels());
    checker.size(&resource.to_value()["spec"]);
    match resource {
        Resource::Endpoint(endpoint) => checker.endpoint(&endpoint.spec),
        Resource::Deployment(deployment) => {
            checker.deployment(&deployment.spec);
            let findings = backends.map(|backends| backends.check(&deployment.spec));
            checker.findings.extend(findings.into_iter().flatten());
        }
        // No rules of its own.
        _ => {}
    }
    checker.findings
}

#[derive(Default)]
pub(crate) struct Checker {
    pub(crate) findings: Vec<Finding>,
}

impl Checker {
    pub(crate) fn report(&mut self, pointer: impl Into<String>, detail: impl Into<String>) {
        self.findings.push(Finding::new(pointer, detail));
    }

    pub(crate) fn require(&mut self, holds: bool, pointer: &str, detail: impl FnOnce() -> String) {
        if !holds {
            self.report(pointer, detail());
        }
    }

    fn size(&mut self, spec: &Value) {
        let bytes = spec.to_string().len();
        self.require(bytes <= SPEC_BYTES_MAX, "/spec", || {
            format!("the spec has {bytes} bytes, and at most {SPEC_BYTES_MAX} are allowed; move long texts into files that the command reads")
        });
    }

    fn labels(&mut self, labels: &Labels) {
        self.require(labels.len() <= LABELS_MAX, "/metadata/labels", || {
            format!(
                "there are {} labels; keep at most {LABELS_MAX}",
                labels.len()
            )
        });
        for (key, value) in labels {
            let pointer = format!("/metadata/labels/{}", escape(key));
            let key_fits = !key.is_empty() && key.len() <= LABEL_BYTES_MAX;
            self.require(key_fits, &pointer, || {
                format!("a label's key has 1 to {LABEL_BYTES_MAX} bytes; shorten it")
            });
            self.require(value.len() <= LABEL_BYTES_MAX, &pointer, || {
                format!("a label's value has at most {LABEL_BYTES_MAX} bytes; shorten it")
            });
            let printable = !key.chars().chain(value.chars()).any(char::is_control);
            self.require(printable, &pointer, || {
                "a label must not contain control characters; remove them".into()
            });
        }
    }

    fn endpoint(&mut self, spec: &EndpointSpec) {
        if let Some(shares) = &spec.traffic {
            self.findings
                .extend(limits::traffic(shares, "/spec/traffic"));
        }
        if let Some(shares) = &spec.mirror {
            self.findings.extend(limits::mirror(shares, "/spec/mirror"));
            let valid = shares
                .iter()
                .filter(|(_, share)| (1..=100).contains(*share));
            for (name, _) in valid {
                self.report(format!("/spec/mirror/{name}"), MIRROR_UNSUPPORTED);
            }
        }
        let bytes = spec.limits.request_bytes_max;
        self.require(
            (1..=REQUEST_BYTES_MAX).contains(&bytes),
            "/spec/limits/requestBytesMax",
            || format!("{bytes} is out of range; use 1 to {REQUEST_BYTES_MAX} bytes"),
        );
    }

    fn deployment(&mut self, spec: &DeploymentSpec) {
        self.identifier(&spec.instance_type, "/spec/instanceType");
        if let Some(region) = &spec.region {
            self.identifier(region, "/spec/region");
        }
        self.findings
            .extend(limits::instances(spec.instances, "/spec/instances"));
        self.env(spec);
        self.request_settings(&spec.request_settings);
        if let Some(routes) = &spec.routes {
            self.route_path(routes.scoring.as_deref(), "/spec/routes/scoring");
            self.route_path(routes.prefix.as_deref(), "/spec/routes/prefix");
        }
        if let Some(drain_timeout) = spec.drain_timeout {
            self.at_most(drain_timeout, DURATION_MAX, "/spec/drainTimeout");
        }
        if let Some(startup_timeout) = spec.startup_timeout {
            let pointer = "/spec/startupTimeout";
            self.require(startup_timeout >= STARTUP_TIMEOUT_MIN, pointer, || {
                format!("a start needs time; use {STARTUP_TIMEOUT_MIN} or more")
            });
            self.at_most(startup_timeout, DURATION_MAX, pointer);
            let delay = spec.readiness_probe.initial_delay;
            self.require(startup_timeout > delay, pointer, || {
                format!("{startup_timeout} is over before the first readiness probe, after {delay}; use more")
            });
        }
        if let Some(grace) = spec.termination_grace {
            let pointer = "/spec/terminationGrace";
            self.require(grace >= TERMINATION_GRACE_MIN, pointer, || {
                format!("a server needs time to end; use {TERMINATION_GRACE_MIN} or more")
            });
            self.at_most(grace, TERMINATION_GRACE_MAX, pointer);
        }
        self.probe(&spec.readiness_probe, "/spec/readinessProbe");
        if let Some(probe) = &spec.liveness_probe {
            self.probe(probe, "/spec/livenessProbe");
        }
    }

    /// Checks the syntax of names in price sheets.
    fn identifier(&mut self, text: &str, pointer: &str) {
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let valid = bytes.len() <= INSTANCE_TYPE_BYTES_MAX
            && edge(bytes.first())
            && edge(bytes.last())
            && bytes.iter().all(inner);
        self.require(valid, pointer, || {
            format!("`{text}` is not valid here; use 1 to {INSTANCE_TYPE_BYTES_MAX} letters, digits, dots, dashes and underscores, with a letter or digit at both ends")
        });
    }

    fn env(&mut self, spec: &DeploymentSpec) {
        let count = spec.env.len();
        self.require(count <= ENV_MAX, "/spec/env", || {
            format!("{count} variables are too many; keep at most {ENV_MAX}")
        });
        for (name, value) in &spec.env {
            let pointer = format!("/spec/env/{}", escape(name));
            self.require(is_variable(name), &pointer, || {
                format!("`{name}` is not a valid variable name; use letters, digits and underscores, not starting with a digit")
            });
            self.require(!name.starts_with(RESERVED_ENV_PREFIX), &pointer, || {
                format!("names that start with {RESERVED_ENV_PREFIX} are reserved for Penstock; use another name")
            });
            match value {
                EnvValue::Plain(text) => {
                    let fits = text.len() <= ENV_VALUE_BYTES_MAX && !text.contains('\0');
                    self.require(fits, &pointer, || {
                        format!("a value has at most {ENV_VALUE_BYTES_MAX} bytes and no NUL character; put long texts into a file")
                    });
                }
                EnvValue::Secret(secret) => self.secret(&secret.secret_ref, &pointer),
            }
        }
    }

    fn secret(&mut self, reference: &str, pointer: &str) {
        let valid = match reference.split_once(':') {
            Some(("env", name)) => is_variable(name),
            Some(("file", path)) => {
                path.starts_with('/') && !path.contains('\0') && path.len() <= ARGUMENT_BYTES_MAX
            }
            _ => false,
        };
        self.require(valid, &format!("{pointer}/secretRef"), || {
            // The text may be the secret itself, entered by mistake, so the message does not repeat it.
            "this is not a reference to a secret; write env:NAME or file:/ABSOLUTE/PATH".into()
        });
    }

    fn request_settings(&mut self, settings: &RequestSettings) {
        let base = "/spec/requestSettings";
        let timeout = format!("{base}/timeout");
        self.require(settings.timeout > Span::ZERO, &timeout, || {
            "a request needs time; use 1ms or more".into()
        });
        self.at_most(settings.timeout, TIMEOUT_MAX, &timeout);
        if let Some(idle) = settings.stream_idle_timeout {
            let pointer = format!("{base}/streamIdleTimeout");
            self.require(idle > Span::ZERO, &pointer, || {
                "a stream needs time from one byte to the next; use 1ms or more".into()
            });
            self.at_most(idle, TIMEOUT_MAX, &pointer);
        }
        if let Some(max_duration) = settings.max_duration {
            let pointer = format!("{base}/maxDuration");
            self.require(max_duration >= settings.timeout, &pointer, || {
                let timeout = settings.timeout;
                format!("{max_duration} is less than `timeout`, {timeout}, within which the response has only to begin; use {timeout} or more")
            });
            self.at_most(max_duration, DURATION_MAX, &pointer);
        }
        self.at_most(
            settings.max_queue_wait,
            QUEUE_WAIT_MAX,
            &format!("{base}/maxQueueWait"),
        );
        self.at_most(
            settings.keep_alive_idle,
            KEEP_ALIVE_IDLE_MAX,
            &format!("{base}/keepAliveIdle"),
        );
        let concurrent = settings.max_concurrent_requests_per_instance;
        self.require(
            (1..=CONCURRENT_REQUESTS_MAX).contains(&concurrent),
            &format!("{base}/maxConcurrentRequestsPerInstance"),
            || format!("{concurrent} is out of range; use 1 to {CONCURRENT_REQUESTS_MAX}"),
        );
    }

    /// Checks a path that is written into request lines as it is.
    fn route_path(&mut self, path: Option<&str>, pointer: &str) {
        let Some(path) = path else { return };
        self.require(path.len() <= ROUTE_PATH_BYTES_MAX, pointer, || {
            format!("a path has at most {ROUTE_PATH_BYTES_MAX} bytes; shorten it")
        });
        let visible = |b: u8| b.is_ascii_graphic() && !matches!(b, b'?' | b'#');
        let valid = path.starts_with('/') && path.bytes().all(visible);
        self.require(valid, pointer, || {
            format!("`{path}` is not a path; start it with `/` and use no spaces, `?` or `#`, such as /invocations")
        });
        self.require(is_percent_encoded(path), pointer, || {
            format!("`{path}` has a `%` without two hexadecimal digits; write %25 for the character itself")
        });
        let has_dots = path
            .to_ascii_lowercase()
            .replace("%2e", ".")
            .split('/')
            .any(|segment| matches!(segment, "." | ".."));
        self.require(!has_dots, pointer, || {
            format!("`{path}` has a segment `.` or `..`; write the path that it leads to")
        });
    }

    fn probe(&mut self, probe: &ProbeSpec, base: &str) {
        let (is_http, is_grpc) = (
            probe.protocol == ProbeProtocol::Http,
            probe.protocol == ProbeProtocol::Grpc,
        );
        self.require(
            is_http || probe.has_default_path(),
            &format!("{base}/path"),
            || "only an http probe has a path; remove it, or remove `protocol`".into(),
        );
        let service = &probe.service;
        let service_pointer = format!("{base}/service");
        self.require(is_grpc || service.is_empty(), &service_pointer, || {
            "only a grpc probe has a service; remove it, or use `protocol: grpc`".into()
        });
        self.require(
            service.len() <= PROBE_SERVICE_BYTES_MAX,
            &service_pointer,
            || format!("a service's name has at most {PROBE_SERVICE_BYTES_MAX} bytes; shorten it"),
        );
        let path = &probe.path;
        let visible = |b: u8| b.is_ascii_graphic() && b != b'#';
        let valid = path.starts_with('/')
            && path.len() <= PROBE_PATH_BYTES_MAX
            && path.bytes().all(visible);
        self.require(valid, &format!("{base}/path"), || {
            format!("`{path}` is not a path; start it with `/` and use no spaces, such as /healthz")
        });
        let period = format!("{base}/period");
        self.require(probe.period >= PROBE_PERIOD_MIN, &period, || {
            format!("a probe runs at most every {PROBE_PERIOD_MIN}; use a longer period")
        });
        self.at_most(probe.period, PROBE_SPAN_MAX, &period);
        let timeout = format!("{base}/timeout");
        self.require(probe.timeout > Span::ZERO, &timeout, || {
            "a probe needs time to be answered; use 1ms or more".into()
        });
        self.at_most(probe.timeout, PROBE_SPAN_MAX, &timeout);
        self.at_most(
            probe.initial_delay,
            PROBE_SPAN_MAX,
            &format!("{base}/initialDelay"),
        );
        for (threshold, field) in [
            (probe.success_threshold, "successThreshold"),
            (probe.failure_threshold, "failureThreshold"),
        ] {
            let valid = (1..=PROBE_THRESHOLD_MAX).contains(&threshold);
            self.require(valid, &format!("{base}/{field}"), || {
                format!("{threshold} is out of range; use 1 to {PROBE_THRESHOLD_MAX}")
            });
        }
    }

    pub(crate) fn at_most(&mut self, span: Span, limit: Span, pointer: &str) {
        self.require(span <= limit, pointer, || {
            format!("{span} is too long; use at most {limit}")
        });
    }
}

/// Whether each `%` begins an encoded byte.
fn is_percent_encoded(text: &str) -> bool {
    text.split('%').skip(1).all(|code| {
        let digits = code.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

fn is_variable(name: &str) -> bool {
    let first = name.bytes().next();
    first.is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && name.len() <= 128
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
