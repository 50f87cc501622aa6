//! Instance logs of all nodes: the local node's are read from its files, other nodes' are fetched from
//! the address in their hello.
//!
//! Invariant: gaps are reported. A node that does not answer costs a line that names it, never the
//! others' output. Nothing is buffered here: nodes first report how many lines they have, and are then
//! read one after the other.

use std::sync::Arc;
use std::time::Duration;

use actuator::logs::{LINES_HEADER, LogsError, LogsQuery, NodeLines, NodeLogs};
use bytes::Bytes;
use cli::error::BoxedError;
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

use super::log_lines::{LineStream, limit_bytes, split_at_lines};

/// Timeout for the first chunk of a node's response, and between two chunks.
const NODE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum size of existing lines in one response, of all nodes together.
const RESPONSE_BYTES_MAX: usize = 128 << 20;
/// Records per read of the members stream.
const PAGE: usize = 1000;

pub struct MemberLogs {
    /// The node in this process.
    own: Option<(String, Arc<dyn NodeLogs>)>,
    store: Store,
    client: NodeClient,
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
        let client = NodeClient { token, http };
        Self { own, store, client }
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

    /// The other nodes and their addresses.
    async fn others(&self) -> Result<Vec<RemoteNode>, StoreError> {
        let own = self.own.as_ref().map(|(id, _)| id);
        let nodes = self.members().await?.nodes.into_iter();
        let others = nodes.filter(|(id, _)| Some(id) != own);
        let others = others.map(|(id, node)| RemoteNode {
            id,
            address: node.address,
        });
        Ok(others.collect())
    }
}

/// Another node, and where its admin listener answers.
struct RemoteNode {
    id: String,
    address: Option<String>,
}

/// Fetches logs from other nodes.
#[derive(Clone)]
struct NodeClient {
    token: Option<InternalToken>,
    http: reqwest::Client,
}

impl NodeClient {
    /// How many lines a node would return, or why it cannot be queried.
    async fn count(
        &self,
        node: &RemoteNode,
        of: &DeploymentRef,
        query: &LogsQuery,
    ) -> Result<usize, BoxedError> {
        let query = LogsQuery {
            follow: false,
            // Without a limit there is nothing to divide, so nothing to count.
            limit: Some(query.limit.unwrap_or(0)),
            ..query.clone()
        };
        let response = self.request(Method::HEAD, node, of, &query).await?;
        let count = response.headers().get(LINES_HEADER);
        let count = count.and_then(|count| count.to_str().ok()?.parse().ok());
        // A node of an older release does not count; assume it fills the limit.
        Ok(count.or(query.limit).unwrap_or_default())
    }

    /// A node's lines, or a notice that says why there are none.
    async fn fetch(self, node: RemoteNode, of: DeploymentRef, query: LogsQuery) -> LineStream {
        match self.request(Method::GET, &node, &of, &query).await {
            Ok(response) => {
                let idle_timeout = (!query.follow).then_some(NODE_TIMEOUT);
                split_at_lines(&node.id, response.bytes_stream(), idle_timeout)
            }
            Err(why) => unavailable(&node.id, &why),
        }
    }

    async fn request(
        &self,
        method: Method,
        node: &RemoteNode,
        of: &DeploymentRef,
        query: &LogsQuery,
    ) -> Result<reqwest::Response, BoxedError> {
        let address = node.address.as_deref();
        let address = address.ok_or("it has not advertised an admin address")?;
        let token = self.token.as_ref();
        let token = token.ok_or(
            "this process has no internal token; give all processes the same --internal-token",
        )?;
        let base = address.trim_end_matches('/');
        let (endpoint, deployment) = (&of.endpoint, &of.deployment);
        let url = format!(
            "{base}/v1/logs/{endpoint}/{deployment}?{}",
            query_string(query)
        );
        let request = self.http.request(method, url).bearer_auth(token.as_str());
        let response = tokio::time::timeout(NODE_TIMEOUT, request.send()).await;
        let response =
            response.map_err(|_| format!("no answer within {} s", NODE_TIMEOUT.as_secs()))??;
        match response.status() {
            StatusCode::UNAUTHORIZED => Err(format!(
                "{base} rejected our token; give all processes the same --internal-token"
            )
            .into()),
            StatusCode::SERVICE_UNAVAILABLE => {
                Err("it has too many log readers; close one, or try again later".into())
            }
            status if !status.is_success() => Err(format!("{status} from {base}").into()),
            _ => Ok(response),
        }
    }
}

/// Encodes the query string.
fn query_string(query: &LogsQuery) -> String {
    let mut parts = vec![
        format!("follow={}", query.follow),
        format!("timestamps={}", query.timestamps),
    ];
    parts.extend(query.since.map(|since| format!("since={since}")));
    parts.extend(query.limit.map(|limit| format!("limit={limit}")));
    // Ids are alphanumeric with dashes, but this one is user input.
    parts.extend(query.instance.as_ref().map(|id| {
        let plain = |c: &char| c.is_ascii_alphanumeric() || *c == '-';
        let id: String = id.as_str().chars().filter(plain).collect();
        format!("instance={id}")
    }));
    parts.join("&")
}

fn unavailable(node: &str, why: &BoxedError) -> LineStream {
    let line = format!("penstock: the logs of node {node} are unavailable: {why}\n");
    stream::iter([Ok(Bytes::from(line))]).boxed()
}

#[async_trait::async_trait]
impl LogSource for MemberLogs {
    async fn logs(&self, of: &DeploymentRef, query: LogQuery) -> Result<LineStream, SourceError> {
        let others = self.others().await;
        let others = others.map_err(|error| SourceError::Failed(error.into()))?;
        if self.own.is_none() && others.is_empty() {
            return Err(SourceError::Unavailable(
                "no node has joined, so there are no logs".into(),
            ));
        }
        let node_query = LogsQuery {
            since: query.since,
            limit: query.lines,
            follow: query.follow,
            timestamps: query.timestamps,
            instance: query.instance,
        };
        let counting = others
            .iter()
            .map(|node| self.client.count(node, of, &node_query));
        let counted = join_all(counting).await;
        let mut own = match &self.own {
            Some((id, node)) => Some((id, node, own_lines(node, of, node_query.clone()).await?)),
            None => None,
        };
        let counts = own.iter().map(|(.., lines)| lines.existing_lines);
        let counts = counts.chain(counted.iter().map(|count| *count.as_ref().unwrap_or(&0)));
        let mut shares = shares(&counts.collect::<Vec<_>>(), node_query.limit).into_iter();
        let mut share = || LogsQuery {
            limit: shares.next().flatten(),
            ..node_query.clone()
        };
        if let Some((id, node, mut lines)) = own.take() {
            let share = share();
            if share
                .limit
                .is_some_and(|limit| limit < lines.existing_lines)
            {
                // Drop the first reader: there may be a permit for only one.
                drop(lines);
                lines = own_lines(node, of, share).await?;
            }
            own = Some((id, node, lines));
        }
        let own = own.map(|(id, _, lines)| split_at_lines(id, lines.stream, None));
        let others = others.into_iter().zip(counted);
        let others = others.map(|(node, count)| (node, count, share()));
        let others: Vec<_> = others.collect();
        let (client, of) = (self.client.clone(), of.clone());
        let others = others.into_iter().map(move |(node, count, share)| {
            let (client, of) = (client.clone(), of.clone());
            async move {
                match count {
                    Ok(_) => client.fetch(node, of, share).await,
                    Err(why) => unavailable(&node.id, &why),
                }
            }
        });
        if node_query.follow {
            let others = join_all(others).await;
            return Ok(stream::select_all(own.into_iter().chain(others)).boxed());
        }
        // Fetched one after the other, each on its turn: a node would drop a stalled connection.
        let others = stream::iter(others).then(|lines| lines).flatten();
        let all = stream::iter(own).flatten().chain(others).boxed();
        Ok(limit_bytes(all, RESPONSE_BYTES_MAX))
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
        LogsError::Failed(detail) => SourceError::Failed(detail.into()),
    })
}

/// Divides the limit evenly over the nodes, since lines carry no times to order them by. A node with
/// fewer lines than its share leaves the rest to the others.
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

    /// A node with these lines; returns the last ones if there is a limit.
    struct FixedLines(&'static str);

    #[async_trait::async_trait]
    impl NodeLogs for FixedLines {
        async fn logs(&self, _: &DeploymentRef, query: LogsQuery) -> Result<NodeLines, LogsError> {
            let lines: Vec<&str> = self.0.split_inclusive('\n').collect();
            let existing_lines = query.limit.unwrap_or(usize::MAX).min(lines.len());
            let text = lines[lines.len() - existing_lines..].concat();
            // In chunks that do not end with lines.
            let (first, second) = text.split_at(text.len() / 2);
            let chunks = [first, second].map(|text| Bytes::from(text.to_owned()));
            let stream = stream::iter(chunks.map(io::Result::Ok)).boxed();
            Ok(NodeLines {
                existing_lines,
                stream,
            })
        }
    }

    /// A node without permits for readers.
    struct BusyNode;

    #[async_trait::async_trait]
    impl NodeLogs for BusyNode {
        async fn logs(&self, _: &DeploymentRef, _: LogsQuery) -> Result<NodeLines, LogsError> {
            Err(LogsError::Busy("full".to_owned()))
        }
    }

    fn token() -> InternalToken {
        InternalToken::new("a token of this test and no other").unwrap()
    }

    async fn node(text: &'static str, token: InternalToken) -> String {
        serve(Arc::new(FixedLines(text)), token).await
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
        while let Some(chunk) = lines.next().await {
            text.extend_from_slice(&chunk.unwrap());
        }
        String::from_utf8(text).unwrap()
    }

    #[tokio::test]
    async fn lines_of_all_nodes_are_shown_and_unreachable_nodes_are_named() {
        let other_node = node("b-1 one\nb-1 two\n", token()).await;
        let stranger = node(
            "c-1 secret\n",
            InternalToken::new("another token, and just as long as").unwrap(),
        );
        let nodes = [
            ("a", None),
            ("b", Some(other_node)),
            ("c", Some(stranger.await)),
            // Nothing listens there any more.
            ("d", Some("http://127.0.0.1:1".into())),
            ("e", None),
        ];
        let (_folder, store) = store(&nodes).await;
        let own = (
            "a".to_owned(),
            Arc::new(FixedLines("a-1 one\n")) as Arc<dyn NodeLogs>,
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
                let unavailable = format!("penstock: the logs of node {node} are unavailable: ");
                assert!(text.contains(&unavailable), "{text}");
            }
        }
    }

    #[tokio::test]
    async fn the_line_limit_is_respected() {
        let other_node = node("b-1 one\nb-1 two\nb-1 three\nb-1 four\n", token()).await;
        let (_folder, store) = store(&[("b", Some(other_node))]).await;
        let own = (
            "a".to_owned(),
            Arc::new(FixedLines("a-1 one\n")) as Arc<dyn NodeLogs>,
        );
        let logs = MemberLogs::new(Some(own), store, Some(token()));
        let query = LogQuery {
            lines: Some(3),
            ..LogQuery::default()
        };
        assert_eq!(text(&logs, query).await, "a-1 one\nb-1 three\nb-1 four\n");
    }

    #[test]
    fn lines_are_divided_evenly_and_unused_shares_go_to_other_nodes() {
        for (counts, limit, expected) in [
            (vec![1, 4], 3, vec![1, 2]),
            (vec![4, 1], 3, vec![2, 1]),
            (vec![4, 4, 4], 8, vec![2, 3, 3]),
            (vec![0, 9, 1], 100, vec![0, 9, 1]),
            (vec![5, 5], 0, vec![0, 0]),
        ] {
            let divided: Vec<usize> = shares(&counts, Some(limit)).into_iter().flatten().collect();
            assert_eq!(divided, expected, "{counts:?}");
        }
        assert_eq!(shares(&[1, 2], None), [None, None]);
    }

    #[tokio::test]
    async fn busy_remote_nodes_are_named_and_a_busy_local_node_refuses() {
        let other_node = serve(Arc::new(BusyNode), token()).await;
        let (_folder, store) = store(&[("b", Some(other_node))]).await;
        let logs = MemberLogs::new(None, store.clone(), Some(token()));
        let output = text(&logs, LogQuery::default()).await;
        assert!(
            output.contains("the logs of node b are unavailable"),
            "{output}"
        );
        assert!(output.contains("too many log readers"), "{output}");
        let own = ("a".to_owned(), Arc::new(BusyNode) as Arc<dyn NodeLogs>);
        let logs = MemberLogs::new(Some(own), store, Some(token()));
        let of = "iris/blue".parse().unwrap();
        let refused = logs.logs(&of, LogQuery::default()).await.err();
        assert!(matches!(refused, Some(SourceError::Busy(detail)) if detail == "full"));
    }

    #[tokio::test]
    async fn output_beyond_the_size_limit_is_cut_with_a_notice() {
        let chunks = ["one\n", "two\n", "three\n"].map(|line| Ok(Bytes::from(line)));
        let chunks_out: Vec<_> = limit_bytes(stream::iter(chunks).boxed(), 8).collect().await;
        assert_eq!(chunks_out.len(), 3);
        let unavailable = chunks_out[2].as_ref().unwrap();
        assert!(unavailable.starts_with(b"penstock: the rest is omitted"));
    }

    #[tokio::test]
    async fn without_any_node_the_request_fails_with_a_reason() {
        let (_folder, store) = store(&[]).await;
        let logs = MemberLogs::new(None, store, None);
        let of = "iris/blue".parse().unwrap();
        let node_query = logs.logs(&of, LogQuery::default()).await;
        assert!(matches!(node_query, Err(SourceError::Unavailable(_))));
    }
}
