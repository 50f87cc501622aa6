//! Which processes descend from an instance, remembered while they can be found: a child that leaves its
//! group and its session and clears its environment is still the child of its parent, for as long as that
//! runs.

use std::collections::{BTreeMap, BTreeSet};

use procfs::process::Stat;

use super::record::ProcessIdentity;

/// Processes by id, each with its start time, by which a reused id is told apart.
pub(super) type Family = BTreeMap<i32, u64>;

/// All processes at one time.
#[derive(Debug, Default)]
pub(super) struct ProcessTable {
    by_pid: BTreeMap<i32, Member>,
    by_group: BTreeMap<i32, BTreeSet<i32>>,
    by_parent: BTreeMap<i32, BTreeSet<i32>>,
}

/// What descent is derived from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Member {
    parent: i32,
    group: i32,
    start_time: u64,
}

impl<'a> FromIterator<&'a Stat> for ProcessTable {
    fn from_iter<I: IntoIterator<Item = &'a Stat>>(stats: I) -> Self {
        let mut table = Self::default();
        for stat in stats {
            let member = Member {
                parent: stat.ppid,
                group: stat.pgrp,
                start_time: stat.starttime,
            };
            table.insert(stat.pid, member);
        }
        table
    }
}

impl ProcessTable {
    fn insert(&mut self, pid: i32, member: Member) {
        self.by_group.entry(member.group).or_default().insert(pid);
        self.by_parent.entry(member.parent).or_default().insert(pid);
        self.by_pid.insert(pid, member);
    }

    /// The group of a process that is exactly the recorded one, and still in it.
    pub(super) fn group_of(&self, process: &ProcessIdentity) -> Option<i32> {
        let member = self.by_pid.get(&process.pid)?;
        let is_same = member.start_time == process.start_time && member.group == process.group_id();
        is_same.then_some(member.group)
    }

    /// The members of a group, those of the family that still run, and all their descendants.
    pub(super) fn family(&self, group: Option<i32>, known: &Family) -> Family {
        let in_group = group.and_then(|group| self.by_group.get(&group));
        let still_run = known.iter().filter(|(pid, start_time)| {
            self.by_pid.get(pid).map(|member| member.start_time) == Some(**start_time)
        });
        let mut open: Vec<i32> = in_group.into_iter().flatten().copied().collect();
        open.extend(still_run.map(|(pid, _)| *pid));
        let mut family = Family::new();
        while let Some(pid) = open.pop() {
            let Some(member) = self.by_pid.get(&pid) else {
                continue;
            };
            if family.insert(pid, member.start_time).is_some() {
                continue;
            }
            // No child is older than its parent: one that seems so is of another process with that id.
            let children = self.by_parent.get(&pid).into_iter().flatten();
            open.extend(children.filter(|child| {
                self.by_pid
                    .get(child)
                    .is_some_and(|child| child.start_time >= member.start_time)
            }));
        }
        family
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table of `(pid, parent, group, start time)`.
    fn table(processes: &[(i32, i32, i32, u64)]) -> ProcessTable {
        let mut table = ProcessTable::default();
        for (pid, parent, group, start_time) in processes.iter().copied() {
            let member = Member {
                parent,
                group,
                start_time,
            };
            table.insert(pid, member);
        }
        table
    }

    #[test]
    fn descendants_belong_to_the_family_whatever_their_group_and_stay_when_their_parent_ends() {
        let before = table(&[
            (10, 1, 10, 5),
            (11, 10, 11, 6),
            (12, 11, 12, 7),
            (20, 1, 20, 5),
        ]);
        let family = before.family(Some(10), &Family::new());
        assert_eq!(family, Family::from([(10, 5), (11, 6), (12, 7)]));
        let after = table(&[(12, 1, 12, 7), (13, 12, 13, 9), (20, 1, 20, 5)]);
        let family = after.family(None, &family);
        assert_eq!(family, Family::from([(12, 7), (13, 9)]));
    }

    #[test]
    fn a_reused_id_is_not_of_the_family() {
        let known = Family::from([(11, 6)]);
        let reused = table(&[(11, 1, 11, 9), (12, 11, 12, 10)]);
        assert_eq!(reused.family(None, &known), Family::new());
        let older_child = table(&[(10, 1, 10, 5), (12, 10, 12, 3)]);
        let family = older_child.family(Some(10), &Family::new());
        assert_eq!(family, Family::from([(10, 5)]));
    }

    #[test]
    fn the_group_counts_only_while_its_recorded_process_runs_in_it() {
        let recorded = |start_time, group| ProcessIdentity {
            pid: 10,
            start_time,
            boot_id: String::new(),
            group,
        };
        let table = table(&[(10, 1, 9, 5)]);
        assert_eq!(table.group_of(&recorded(5, Some(9))), Some(9));
        assert_eq!(table.group_of(&recorded(6, Some(9))), None);
        assert_eq!(table.group_of(&recorded(5, None)), None);
    }
}
