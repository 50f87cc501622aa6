//! A small least-recently-used cache.

/// Holds at most `max` entries and evicts the least recently used one.
pub(crate) struct Recent<K, V> {
    max: usize,
    /// From least to most recently used.
    kept: Vec<(K, V)>,
}

impl<K: PartialEq, V: Clone> Recent<K, V> {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            kept: Vec::new(),
        }
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        let at = self.kept.iter().position(|(kept, _)| kept == key)?;
        let entry = self.kept.remove(at);
        let value = entry.1.clone();
        self.kept.push(entry);
        Some(value)
    }

    pub(crate) fn put(&mut self, key: K, value: V) {
        self.kept.retain(|(kept, _)| *kept != key);
        if self.kept.len() >= self.max {
            self.kept.remove(0);
        }
        self.kept.push((key, value));
    }

    pub(crate) fn clear(&mut self) {
        self.kept.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_entry_is_evicted() {
        let mut recent = Recent::new(2);
        recent.put(1, "a");
        recent.put(2, "b");
        assert_eq!(recent.get(&1), Some("a"));
        recent.put(3, "c");
        assert_eq!(recent.get(&2), None);
        assert_eq!((recent.get(&1), recent.get(&3)), (Some("a"), Some("c")));
    }
}
