//! Which kind of stream each event type belongs in: one writing service per stream, held at every
//! commit and checked again by `verify`.

use contract::events::Event;
use contract::log::{StreamKind, StreamName};

/// Whether an event may stand in this stream.
pub fn belongs(event: &Event, stream: &StreamName) -> bool {
    let kind = stream.as_str().split('/').next().unwrap_or_default();
    kinds(event).iter().any(|allowed| allowed.as_str() == kind)
}

fn kinds(event: &Event) -> &'static [StreamKind] {
    use StreamKind::{Access, Endpoint, Instances, Members, Node, Parking, Scaling, Usage};
    match event {
        Event::EndpointCreated(_)
        | Event::EndpointUpdated(_)
        | Event::TrafficSet(_)
        | Event::KeyRegenerated(_)
        | Event::EndpointStateChanged(_)
        | Event::EndpointDeletionRequested(_)
        | Event::EndpointDeleted(_)
        | Event::DeploymentCreated(_)
        | Event::DeploymentUpdated(_)
        | Event::DeploymentStateChanged(_)
        | Event::DeploymentDeletionRequested(_)
        | Event::DeploymentDeleted(_)
        | Event::AutoscaleSet(_)
        | Event::AutoscaleRemoved(_)
        | Event::AutoscalePinned(_)
        | Event::AutoscaleReleased(_)
        | Event::AutoscalePauseSet(_) => &[Endpoint],
        Event::ScalingDecided(_) => &[Scaling],
        // Any owner of a bucket may find that its clock was set back.
        Event::ClockStepped(_) => &[Endpoint, Scaling, Instances, Node, Usage],
        Event::InstanceRequested(_)
        | Event::InstanceDraining(_)
        | Event::InstanceRemovalRequested(_) => &[Instances],
        Event::InstanceStarted(_)
        | Event::InstanceReady(_)
        | Event::InstanceUnready(_)
        | Event::InstanceFailed(_)
        | Event::InstanceStopped(_) => &[Node],
        Event::UsageClosed(_) | Event::UsageCorrected(_) | Event::UsageGap(_) => &[Usage],
        Event::AccessGranted(_) | Event::AccessRevoked(_) => &[Access],
        Event::MemberJoined(_) | Event::MemberLeft(_) => &[Members],
        Event::EventSkipped(_) | Event::ConsumerUnparked(_) => &[Parking],
    }
}
