//! The output of instances on all nodes: our own node's is read from its files, other nodes are
//! asked where their hello says they answer.
//!
//! Invariant: what is missing is said. A node that does not answer costs a line that names it, never
//! the others' output.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{LogsQuery, NodeLogs};
use bytes::{Bytes, BytesMut};
use contract::ids::DeploymentRef;
use contract::log::StreamName;
use control::{LogQuery, LogSource, SourceError};
use domain::members::Members;
use futures::future::join_all;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use runtime::token::InternalToken;
use store::{Store, StoreError};

/// How long a node may take to begin its answer, and between two pieces of it.
const PATIENCE: Duration = Duration::from_secs(3);
/// Most bytes of one node's past that are held to count its lines.
const PAST_BYTES_MAX: usize = 32 << 20;
/// A line that is longer is passed on in pieces.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Records per read of the stream of members.
const PAGE: usize = 1000;

type Lines = BoxStream<'static, io::Result<Bytes>>;

pub struct MemberLogs {
    /// The node in this process.
    own: Option<(String, Arc<dyn NodeLogs>)>,
    store: Store,
    token: Option<InternalToken>,
    http: reqwest::Client,
}

impl MemberLogs {
    pub fn new(
        own: Option<(String, Arc<dyn NodeLogs>)>,
        store: Store,
        token: Option<InternalToken>,
    ) -> Self {
        Self {
            own,
            store,
            token,
            // A proxy would read the token.
            http: reqwest::Client::builder()
                .no_proxy()
                .build()
                .unwrap_or_default(),
        }
    }

    async fn members(&self) -> Result<Members, StoreError> {
        let stream = StreamName::members();
        let mut members = Members::default();
        loop {
            let page = self
                .store
                .read_stream(&stream, members.version, PAGE)
                .await?;
            if page.is_empty() {
                return Ok(members);
            }
            page.iter().for_each(|record| members.apply(record));
        }
    }

    /// One node's lines, or a line that says why there are none.
    async fn ask(
        &self,
        node: &str,
        address: Option<&str>,
        of: &DeploymentRef,
        query: &LogsQuery,
    ) -> Lines {
        let asked = self.request(address, of, query);
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(response)) => {
                let patience = (!query.follow).then_some(PATIENCE);
                whole_lines(node, response.bytes_stream(), patience)
            }
            Ok(Err(why)) => note(node, &why),
            Err(_) => note(node, &format!("no answer within {} s", PATIENCE.as_secs())),
        }
    }

    async fn request(
        &self,
        address: Option<&str>,
        of: &DeploymentRef,
        query: &LogsQuery,
    ) -> Result<reqwest::Response, String> {
        let address = address.ok_or("it has not said where its admin listener answers")?;
        let token = self.token.as_ref();
        let token = token.ok_or_else(|| {
            "this process has no token to ask it with; give all processes the same --internal-token".to_owned()
        })?;
        let base = address.trim_end_matches('/');
        let (endpoint, deployment) = (&of.endpoint, &of.deployment);
        let url = format!("{base}/v1/logs/{endpoint}/{deployment}?{}", form(query));
        let request = self.http.get(url).bearer_auth(token.as_str());
        let response = request.send().await.map_err(|error| error.to_string())?;
        if response.status() == reqwest::StatusCode::UNAUTHORIZED {
            return Err(format!(
                "{base} does not take our token; give all processes the same --internal-token"
            ));
        }
        if !response.status().is_success() {
            return Err(format!("{} from {base}", response.status()));
        }
        Ok(response)
    }
}

/// The query, written as one.
fn form(query: &LogsQuery) -> String {
    let mut parts = vec![
        format!("follow={}", query.follow),
        format!("timestamps={}", query.timestamps),
    ];
    parts.extend(query.since.map(|since| format!("since={since}")));
    parts.extend(query.limit.map(|limit| format!("limit={limit}")));
    // An id is made of names and digits, but this one was typed by somebody.
    parts.extend(query.instance.as_ref().map(|id| {
        let plain = |c: &char| c.is_ascii_alphanumeric() || *c == '-';
        let id: String = id.as_str().chars().filter(plain).collect();
        format!("instance={id}")
    }));
    parts.join("&")
}

fn note(node: &str, why: &str) -> Lines {
    let line = format!("penstock: node {node} cannot be asked for its logs: {why}\n");
    stream::iter([Ok(Bytes::from(line))]).boxed()
}

struct Reading<S> {
    node: String,
    source: Pin<Box<S>>,
    buffer: BytesMut,
    patience: Option<Duration>,
    over: bool,
}

/// Pieces that end with a line, so that those of several nodes can be mixed.
fn whole_lines<S, E>(node: &str, source: S, patience: Option<Duration>) -> Lines
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display + 'static,
{
    let reading = Reading {
        node: node.to_owned(),
        source: Box::pin(source),
        buffer: BytesMut::new(),
        patience,
        over: false,
    };
    stream::unfold(reading, Reading::next).boxed()
}

impl<S, E> Reading<S>
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::fmt::Display,
{
    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        if self.over {
            return None;
        }
        loop {
            match self.piece().await {
                Ok(Some(piece)) => {
                    self.buffer.extend_from_slice(&piece);
                    if let Some(lines) = self.lines() {
                        return Some((Ok(lines), self));
                    }
                }
                ended => {
                    self.over = true;
                    if !self.buffer.is_empty() {
                        self.buffer.extend_from_slice(b"\n");
                    }
                    if let Err(why) = ended {
                        let line = format!("penstock: node {} broke off: {why}\n", self.node);
                        self.buffer.extend_from_slice(line.as_bytes());
                    }
                    let rest = self.buffer.split().freeze();
                    return (!rest.is_empty()).then_some((Ok(rest), self));
                }
            }
        }
    }

    async fn piece(&mut self) -> Result<Option<Bytes>, String> {
        let piece = self.source.next();
        let piece = match self.patience {
            None => piece.await,
            Some(patience) => match tokio::time::timeout(patience, piece).await {
                Ok(piece) => piece,
                Err(_) => return Err(format!("nothing for {} s", patience.as_secs())),
            },
        };
        piece.transpose().map_err(|error| error.to_string())
    }

    /// What there is up to the end of a line.
    fn lines(&mut self) -> Option<Bytes> {
        let end = self.buffer.iter().rposition(|byte| *byte == b'\n');
        match end {
            Some(end) => Some(self.buffer.split_to(end + 1).freeze()),
            None if self.buffer.len() > LINE_BYTES_MAX => {
                let mut piece = self.buffer.split();
                piece.extend_from_slice(b"\n");
                Some(piece.freeze())
            }
            None => None,
        }
    }
}

#[async_trait::async_trait]
impl LogSource for MemberLogs {
    async fn logs(
        &self,
        of: &DeploymentRef,
        query: LogQuery,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, SourceError> {
        let members = self.members().await;
        let members = members.map_err(|error| SourceError::Failed(error.to_string()))?;
        let asked = LogsQuery {
            since: query.since,
            limit: query.lines,
            follow: query.follow,
            timestamps: query.timestamps,
            instance: query.instance,
        };
        let own_id = self.own.as_ref().map(|(id, _)| id);
        let others = members.nodes.iter().filter(|(id, _)| Some(*id) != own_id);
        let answers = others.map(|(id, node)| self.ask(id, node.address.as_deref(), of, &asked));
        let mut lines = join_all(answers).await;
        if let Some((id, own)) = &self.own {
            let own = own.logs(of, asked.clone()).await;
            let own = own.map_err(SourceError::Failed)?;
            lines.insert(0, whole_lines(id, own, None));
        }
        match (lines.len(), asked.limit) {
            (0, _) => Err(SourceError::Unavailable(
                "no node has joined, so there is nobody to ask for logs".into(),
            )),
            _ if asked.follow => Ok(stream::select_all(lines).boxed()),
            (1, _) | (_, None) => Ok(stream::iter(lines).flatten().boxed()),
            (_, Some(limit)) => {
                let pasts = join_all(lines.into_iter().map(|lines| past(lines, limit))).await;
                let lines = newest(pasts, limit);
                Ok(stream::iter([Ok(Bytes::from(lines))]).boxed())
            }
        }
    }
}

/// The last lines of a node's past.
async fn past(mut lines: Lines, limit: usize) -> VecDeque<Vec<u8>> {
    let mut past = VecDeque::new();
    let mut bytes = 0;
    while let Some(Ok(piece)) = lines.next().await {
        for line in piece.split_inclusive(|byte| *byte == b'\n') {
            bytes += line.len();
            past.push_back(line.to_vec());
            while past.len() > limit || bytes > PAST_BYTES_MAX {
                bytes -= past.pop_front().map_or(bytes, |dropped| dropped.len());
            }
        }
    }
    past
}

/// As many lines as asked for, dealt over the nodes: lines carry no times to order them by.
fn newest(mut pasts: Vec<VecDeque<Vec<u8>>>, limit: usize) -> Vec<u8> {
    let mut surplus = pasts.iter().map(VecDeque::len).sum::<usize>();
    while surplus > limit {
        if let Some(longest) = pasts.iter_mut().max_by_key(|past| past.len()) {
            longest.pop_front();
        }
        surplus -= 1;
    }
    pasts.into_iter().flatten().flatten().collect()
}

#[cfg(test)]
mod tests {
    use actuator::logs::router;
    use contract::events::{Event, MemberJoined};
    use contract::frame::{Source, SourceKind};
    use contract::log::{Actor, NewEvent};
    use contract::time::Timestamp;
    use store::{Append, Commit};
    use tokio::net::TcpListener;

    use super::*;

    /// A node that says its lines.
    struct Says(&'static str);

    #[async_trait::async_trait]
    impl NodeLogs for Says {
        async fn logs(
            &self,
            _of: &DeploymentRef,
            _query: LogsQuery,
        ) -> Result<BoxStream<'static, io::Result<Bytes>>, String> {
            // In pieces that do not keep to lines.
            let (first, second) = self.0.split_at(self.0.len() / 2);
            Ok(stream::iter([Ok(first.into()), Ok(second.into())]).boxed())
        }
    }

    fn token() -> InternalToken {
        InternalToken::new("a token of this test and no other").unwrap()
    }

    async fn node(says: &'static str, token: InternalToken) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = router(Arc::new(Says(says)), Some(token));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        address
    }

    async fn store(nodes: &[(&str, Option<String>)]) -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("log.db").display());
        let store = Store::open(&url).await.unwrap();
        let events = nodes.iter().map(|(id, address)| NewEvent {
            id: uuid::Uuid::now_v7(),
            time: Timestamp::from_secs(1),
            actor: Actor::service("test"),
            event: Event::MemberJoined(MemberJoined {
                source: Source {
                    kind: SourceKind::Node,
                    id: (*id).to_owned(),
                },
                address: address.clone(),
                backends: Vec::new(),
            }),
        });
        let append = Append {
            stream: StreamName::members(),
            expected_version: 0,
            events: events.collect(),
        };
        let commit = Commit {
            appends: vec![append],
            ..Commit::default()
        };
        if !nodes.is_empty() {
            store.commit(commit).await.unwrap();
        }
        (folder, store)
    }

    async fn text(logs: &MemberLogs, query: LogQuery) -> String {
        let of = "iris/blue".parse().unwrap();
        let mut lines = logs.logs(&of, query).await.unwrap();
        let mut text = Vec::new();
        while let Some(piece) = lines.next().await {
            text.extend_from_slice(&piece.unwrap());
        }
        String::from_utf8(text).unwrap()
    }

    #[tokio::test]
    async fn the_lines_of_all_nodes_are_shown_and_who_cannot_be_asked_is_named() {
        let there = node("b-1 one\nb-1 two\n", token()).await;
        let stranger = node(
            "c-1 secret\n",
            InternalToken::new("another token, and just as long as").unwrap(),
        );
        let nodes = [
            ("a", None),
            ("b", Some(there)),
            ("c", Some(stranger.await)),
            // Nobody listens there any more.
            ("d", Some("http://127.0.0.1:1".into())),
            ("e", None),
        ];
        let (_folder, store) = store(&nodes).await;
        let own = (
            "a".to_owned(),
            Arc::new(Says("a-1 one\n")) as Arc<dyn NodeLogs>,
        );
        let logs = MemberLogs::new(Some(own), store, Some(token()));
        for follow in [false, true] {
            let query = LogQuery {
                follow,
                ..LogQuery::default()
            };
            let text = text(&logs, query).await;
            for line in ["a-1 one\n", "b-1 one\n", "b-1 two\n"] {
                assert!(text.contains(line), "{text}");
            }
            assert!(!text.contains("secret"), "{text}");
            assert!(text.contains("the same --internal-token"), "{text}");
            for node in ["c", "d", "e"] {
                let note = format!("penstock: node {node} cannot be asked for its logs: ");
                assert!(text.contains(&note), "{text}");
            }
        }
    }

    #[tokio::test]
    async fn no_more_lines_are_shown_than_were_asked_for() {
        let there = node("b-1 one\nb-1 two\nb-1 three\nb-1 four\n", token()).await;
        let (_folder, store) = store(&[("b", Some(there))]).await;
        let own = (
            "a".to_owned(),
            Arc::new(Says("a-1 one\n")) as Arc<dyn NodeLogs>,
        );
        let logs = MemberLogs::new(Some(own), store, Some(token()));
        let query = LogQuery {
            lines: Some(3),
            ..LogQuery::default()
        };
        assert_eq!(text(&logs, query).await, "a-1 one\nb-1 three\nb-1 four\n");
    }

    #[tokio::test]
    async fn without_any_node_it_is_said_that_there_is_none() {
        let (_folder, store) = store(&[]).await;
        let logs = MemberLogs::new(None, store, None);
        let of = "iris/blue".parse().unwrap();
        let asked = logs.logs(&of, LogQuery::default()).await;
        assert!(matches!(asked, Err(SourceError::Unavailable(_))));
    }
}
