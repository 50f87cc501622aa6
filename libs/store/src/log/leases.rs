//! Ownership as the holder of a store takes and gives it.

use std::time::Duration;

use crate::log::store::Store;
use crate::model::commit::Fence;
use crate::model::error::StoreError;
use crate::writing::alone::Alone;
use crate::writing::lease::FenceChange;

impl Store {
    /// Takes ownership of what the name stands for: every fence taken before is refused from now on.
    pub async fn take(&self, name: &str) -> Result<Fence, StoreError> {
        let change = FenceChange::Take {
            name: name.to_owned(),
        };
        let answer = self.alone(Alone::Fence(change)).await?;
        Ok(Fence {
            name: name.to_owned(),
            generation: answer.number.unwrap_or_default(),
        })
    }

    /// The same for many names, in one commit. The fences are in order of their names.
    pub async fn take_all(&self, names: Vec<String>) -> Result<Vec<Fence>, StoreError> {
        Ok(self.alone(Alone::Take(names)).await?.fences)
    }

    /// Makes this holder the only owner for a while, unless another one is: then None. Who held it
    /// before (also under the same name) is refused from now on.
    pub async fn acquire_lease(
        &self,
        name: &str,
        holder: &str,
        ttl: Duration,
    ) -> Result<Option<Fence>, StoreError> {
        let change = FenceChange::Acquire {
            name: name.to_owned(),
            holder: holder.to_owned(),
            ttl,
        };
        let answer = self.alone(Alone::Fence(change)).await?;
        Ok(answer.number.map(|generation| Fence {
            name: name.to_owned(),
            generation,
        }))
    }

    /// Holds a lease for longer. False once somebody else has it, or may have had it.
    pub async fn renew_lease(
        &self,
        fence: &Fence,
        holder: &str,
        ttl: Duration,
    ) -> Result<bool, StoreError> {
        let change = FenceChange::Renew {
            fence: fence.clone(),
            holder: holder.to_owned(),
            ttl,
        };
        Ok(self.alone(Alone::Fence(change)).await?.number.is_some())
    }

    /// Lets others have a lease at once. Does nothing where it was taken over already. The fence
    /// itself is refused only when the next holder has acquired.
    pub async fn release_lease(&self, fence: &Fence) -> Result<(), StoreError> {
        let change = FenceChange::Release {
            fence: fence.clone(),
        };
        self.alone(Alone::Fence(change)).await?;
        Ok(())
    }
}
