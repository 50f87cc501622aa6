//! What a policy is allowed to say and its author probably does not mean.

use contract::problem::Finding;

use super::policy::Policy;

pub(super) fn warnings(_policy: &Policy) -> Vec<Finding> {
    Vec::new()
}
