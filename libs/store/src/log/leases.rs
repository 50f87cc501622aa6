//! Fences and leases of a store.

use std::time::Duration;

use crate::log::store::Store;
use crate::model::commit::Fence;
use crate::model::error::StoreError;
use crate::writing::exclusive::ExclusiveTask;
use crate::writing::lease::FenceChange;

impl Store {
    /// Takes the fence of this name: every fence taken before is refused from now on.
    ///
    /// # Errors
    ///
    /// If the store cannot be written or is closed.
    pub async fn acquire_fence(&self, name: &str) -> Result<Fence, StoreError> {
        let change = FenceChange::Take {
            name: name.to_owned(),
        };
        let output = self
            .run_exclusive(ExclusiveTask::ChangeFence(change))
            .await?;
        Ok(Fence {
            name: name.to_owned(),
            generation: output.number.unwrap_or_default(),
        })
    }

    /// Takes many fences in one commit. Returns them in order of their names.
    ///
    /// # Errors
    ///
    /// If the store cannot be written or is closed.
    pub async fn acquire_fences(&self, names: Vec<String>) -> Result<Vec<Fence>, StoreError> {
        Ok(self
            .run_exclusive(ExclusiveTask::TakeFences(names))
            .await?
            .fences)
    }

    /// Acquires a lease for `ttl`, or returns None while another holder has it. Earlier fences of the lease,
    /// including those of the same holder, are refused from now on.
    ///
    /// # Errors
    ///
    /// If the store cannot be written or is closed.
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
        let output = self
            .run_exclusive(ExclusiveTask::ChangeFence(change))
            .await?;
        Ok(output.number.map(|generation| Fence {
            name: name.to_owned(),
            generation,
        }))
    }

    /// Extends a lease. Returns false if another holder has it or may have had it.
    ///
    /// # Errors
    ///
    /// If the store cannot be written or is closed. A lost lease is no error.
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
        Ok(self
            .run_exclusive(ExclusiveTask::ChangeFence(change))
            .await?
            .number
            .is_some())
    }

    /// Releases a lease so that others can acquire it at once. Does nothing if it was already taken over.
    /// The fence itself stays valid until the next holder acquires the lease.
    ///
    /// # Errors
    ///
    /// If the store cannot be written or is closed.
    pub async fn release_lease(&self, fence: &Fence) -> Result<(), StoreError> {
        let change = FenceChange::Release {
            fence: fence.clone(),
        };
        self.run_exclusive(ExclusiveTask::ChangeFence(change))
            .await?;
        Ok(())
    }
}
