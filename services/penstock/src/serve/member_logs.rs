//! The output of instances on all nodes: our own node's is read from its files, other nodes are
//! asked where their hello says they answer.
//!
//! Invariant: what is missing is said. A node that does not answer costs a line that names it, never
//! the others' output. Nothing is collected here: nodes say how many lines they have before any is
//! asked for, and are read one after the other.

use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{LINES_HEADER, LogsError, LogsQuery, NodeLines, NodeLogs};
use bytes::Bytes;
use contract::ids::DeploymentRef;
use contract::log::StreamName;
use control::{LogQuery, LogSource, SourceError};
use domain::members::Members;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream;
use reqwest::{Method, StatusCode};
use runtime::token::InternalToken;
use store::{Store, StoreError};

use super::log_lines::{Lines, bounded, whole_lines};

/// How long a node may take to begin its answer, and between two pieces of it.
const PATIENCE: Duration = Duration::from_secs(3);
/// Most bytes of the past in one answer, of all nodes together.
const ANSWER_BYTES_MAX: usize = 128 << 20;
/// Records per read of the stream of members.
const PAGE: usize = 1000;

pub struct MemberLogs {
    /// The node in this process.
    own: Option<(String, Arc<dyn NodeLogs>)>,
    store: Store,
    asker: Asker,
}

impl MemberLogs {
    pub fn new(
        own: Option<(String, Arc<dyn NodeLogs>)>,
        store: Store,
        token: Option<InternalToken>,
    ) -> Self {
        // A proxy would read the token.
        let http = reqwest::Client::builder().no_proxy().build();
        let http = http.unwrap_or_default();
        let asker = Asker { token, http };
        Self { own, store, asker }
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

    /// Where the other nodes answer.
    async fn others(&self) -> Result<Vec<Node>, StoreError> {
        let own = self.own.as_ref().map(|(id, _)| id);
        let nodes = self.members().await?.nodes.into_iter();
        let others = nodes.filter(|(id, _)| Some(id) != own);
        let others = others.map(|(id, node)| Node {
            id,
            address: node.address,
        });
        Ok(others.collect())
    }
}

/// Another node.
struct Node {
    id: String,
    address: Option<String>,
}

/// Asks other nodes.
#[derive(Clone)]
struct Asker {
    token: Option<InternalToken>,
    http: reqwest::Client,
}

impl Asker {
    /// How many lines a node would show; or why it cannot be asked.
    async fn count(
        &self,
        node: &Node,
        of: &DeploymentRef,
        query: &LogsQuery,
    ) -> Result<usize, String> {
        let query = LogsQuery {
            follow: false,
            // Without a limit nothing is dealt, so nothing needs to be counted.
            limit: Some(query.limit.unwrap_or(0)),
            ..query.clone()
        };
        let response = self.request(Method::HEAD, node, of, &query).await?;
        let count = response.headers().get(LINES_HEADER);
        let count = count.and_then(|count| count.to_str().ok()?.parse().ok());
        // A node of a release that does not count shows as many as it is asked for.
        Ok(count.or(query.limit).unwrap_or_default())
    }

    /// One node's lines, or a line that says why there are none.
    async fn ask(self, node: Node, of: DeploymentRef, query: LogsQuery) -> Lines {
        match self.request(Method::GET, &node, &of, &query).await {
            Ok(response) => {
                let patience = (!query.follow).then_some(PATIENCE);
                whole_lines(&node.id, response.bytes_stream(), patience)
            }
            Err(why) => note(&node.id, &why),
        }
    }

    async fn request(
        &self,
        method: Method,
        node: &Node,
        of: &DeploymentRef,
        query: &LogsQuery,
    ) -> Result<reqwest::Response, String> {
        let address = node.address.as_deref();
        let address = address.ok_or("it has not said where its admin listener answers")?;
        let token = self.token.as_ref();
        let token = token.ok_or_else(|| {
            "this process has no token to ask it with; give all processes the same --internal-token".to_owned()
        })?;
        let base = address.trim_end_matches('/');
        let (endpoint, deployment) = (&of.endpoint, &of.deployment);
        let url = format!("{base}/v1/logs/{endpoint}/{deployment}?{}", form(query));
        let request = self.http.request(method, url).bearer_auth(token.as_str());
        let response = tokio::time::timeout(PATIENCE, request.send()).await;
        let response = response
            .map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))?
            .map_err(|error| error.to_string())?;
        match response.status() {
            StatusCode::UNAUTHORIZED => Err(format!(
                "{base} does not take our token; give all processes the same --internal-token"
            )),
            StatusCode::SERVICE_UNAVAILABLE => Err(
                "it has no room for more readers of logs; close one, or try again later".to_owned(),
            ),
            status if !status.is_success() => Err(format!("{status} from {base}")),
            _ => Ok(response),
        }
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

#[async_trait::async_trait]
impl LogSource for MemberLogs {
    async fn logs(&self, of: &DeploymentRef, query: LogQuery) -> Result<Lines, SourceError> {
        let others = self.others().await;
        let others = others.map_err(|error| SourceError::Failed(error.to_string()))?;
        if self.own.is_none() && others.is_empty() {
            return Err(SourceError::Unavailable(
                "no node has joined, so there is nobody to ask for logs".into(),
            ));
        }
        let asked = LogsQuery {
            since: query.since,
            limit: query.lines,
            follow: query.follow,
            timestamps: query.timestamps,
            instance: query.instance,
        };
        let counting = others.iter().map(|node| self.asker.count(node, of, &asked));
        let counted = join_all(counting).await;
        let mut own = match &self.own {
            Some((id, node)) => Some((id, node, own_lines(node, of, asked.clone()).await?)),
            None => None,
        };
        let counts = own.iter().map(|(.., lines)| lines.past);
        let counts = counts.chain(counted.iter().map(|count| *count.as_ref().unwrap_or(&0)));
        let mut shares = shares(&counts.collect::<Vec<_>>(), asked.limit).into_iter();
        let mut share = || LogsQuery {
            limit: shares.next().flatten(),
            ..asked.clone()
        };
        if let Some((id, node, mut lines)) = own.take() {
            let share = share();
            if share.limit.is_some_and(|limit| limit < lines.past) {
                // Two readers at once would be one too many where there is room for one.
                drop(lines);
                lines = own_lines(node, of, share).await?;
            }
            own = Some((id, node, lines));
        }
        let own = own.map(|(id, _, lines)| whole_lines(id, lines.stream, None));
        let others = others.into_iter().zip(counted);
        let others = others.map(|(node, count)| (node, count, share()));
        let others: Vec<_> = others.collect();
        let (asker, of) = (self.asker.clone(), of.clone());
        let others = others.into_iter().map(move |(node, count, share)| {
            let (asker, of) = (asker.clone(), of.clone());
            async move {
                match count {
                    Ok(_) => asker.ask(node, of, share).await,
                    Err(why) => note(&node.id, &why),
                }
            }
        });
        if asked.follow {
            let others = join_all(others).await;
            return Ok(stream::select_all(own.into_iter().chain(others)).boxed());
        }
        // One after the other, each asked when it is its turn: a node would give up one that waits.
        let others = stream::iter(others).then(|asked| asked).flatten();
        let all = stream::iter(own).flatten().chain(others).boxed();
        Ok(bounded(all, ANSWER_BYTES_MAX))
    }
}

async fn own_lines(
    node: &Arc<dyn NodeLogs>,
    of: &DeploymentRef,
    query: LogsQuery,
) -> Result<NodeLines, SourceError> {
    let lines = node.logs(of, query).await;
    lines.map_err(|error| match error {
        LogsError::Busy(detail) => SourceError::Busy(detail),
        LogsError::Failed(detail) => SourceError::Failed(detail),
    })
}

/// As many lines as asked for, dealt over the nodes: lines carry no times to order them by. A node that
/// has fewer than its share leaves the rest to the others.
fn shares(counts: &[usize], limit: Option<usize>) -> Vec<Option<usize>> {
    let mut shares = vec![limit; counts.len()];
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|node| counts[*node]);
    let Some(mut left) = limit else { return shares };
    for (done, node) in order.iter().enumerate() {
        let share = counts[*node].min(left / (order.len() - done));
        shares[*node] = Some(share);
        left -= share;
    }
    shares
}

#[cfg(test)]
mod tests {
    use std::io;

    use actuator::logs::router;
    use contract::events::{Event, MemberJoined};
    use contract::frame::{Source, SourceKind};
    use contract::log::{Actor, NewEvent};
    use contract::time::Timestamp;
    use store::{Append, Commit};
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// A node that says its lines, the last of them if there is a limit.
    struct Says(&'static str);

    #[async_trait::async_trait]
    impl NodeLogs for Says {
        async fn logs(&self, _: &DeploymentRef, query: LogsQuery) -> Result<NodeLines, LogsError> {
            let lines: Vec<&str> = self.0.split_inclusive('\n').collect();
            let past = query.limit.unwrap_or(usize::MAX).min(lines.len());
            let text = lines[lines.len() - past..].concat();
            // In pieces that do not keep to lines.
            let (first, second) = text.split_at(text.len() / 2);
            let pieces = [first, second].map(|text| Bytes::from(text.to_owned()));
            let stream = stream::iter(pieces.map(io::Result::Ok)).boxed();
            Ok(NodeLines { past, stream })
        }
    }

    /// A node without room.
    struct Full;

    #[async_trait::async_trait]
    impl NodeLogs for Full {
        async fn logs(&self, _: &DeploymentRef, _: LogsQuery) -> Result<NodeLines, LogsError> {
            Err(LogsError::Busy("full".to_owned()))
        }
    }

    fn token() -> InternalToken {
        InternalToken::new("a token of this test and no other").unwrap()
    }

    async fn node(says: &'static str, token: InternalToken) -> String {
        serve(Arc::new(Says(says)), token).await
    }

    async fn serve(node: Arc<dyn NodeLogs>, token: InternalToken) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = router(node, Some(token), CancellationToken::new());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        address
    }

    #[expect(clippy::disallowed_methods, reason = "tests use fresh ids")]
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
                    kind: SourceKind::NODE,
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

    #[test]
    fn lines_are_dealt_evenly_and_what_one_lacks_others_have() {
        for (counts, limit, expected) in [
            (vec![1, 4], 3, vec![1, 2]),
            (vec![4, 1], 3, vec![2, 1]),
            (vec![4, 4, 4], 8, vec![2, 3, 3]),
            (vec![0, 9, 1], 100, vec![0, 9, 1]),
            (vec![5, 5], 0, vec![0, 0]),
        ] {
            let dealt: Vec<usize> = shares(&counts, Some(limit)).into_iter().flatten().collect();
            assert_eq!(dealt, expected, "{counts:?}");
        }
        assert_eq!(shares(&[1, 2], None), [None, None]);
    }

    #[tokio::test]
    async fn nodes_without_room_are_named_and_our_own_refuses() {
        let there = serve(Arc::new(Full), token()).await;
        let (_folder, store) = store(&[("b", Some(there))]).await;
        let logs = MemberLogs::new(None, store.clone(), Some(token()));
        let said = text(&logs, LogQuery::default()).await;
        assert!(said.contains("node b cannot be asked"), "{said}");
        assert!(said.contains("no room for more readers"), "{said}");
        let own = ("a".to_owned(), Arc::new(Full) as Arc<dyn NodeLogs>);
        let logs = MemberLogs::new(Some(own), store, Some(token()));
        let of = "iris/blue".parse().unwrap();
        let refused = logs.logs(&of, LogQuery::default()).await.err();
        assert_eq!(refused, Some(SourceError::Busy("full".to_owned())));
    }

    #[tokio::test]
    async fn more_than_an_answer_holds_is_left_out_and_that_is_said() {
        let pieces = ["one\n", "two\n", "three\n"].map(|line| Ok(Bytes::from(line)));
        let given: Vec<_> = bounded(stream::iter(pieces).boxed(), 8).collect().await;
        assert_eq!(given.len(), 3);
        let note = given[2].as_ref().unwrap();
        assert!(note.starts_with(b"penstock: what follows is left out"));
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
