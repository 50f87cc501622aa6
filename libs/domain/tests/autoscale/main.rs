//! The autoscale engine against its specification: which documents it rejects, what rules decide,
//! when schedules are active, and what holds for every decision.

#![allow(clippy::unwrap_used)]

mod causes;
mod compile;
mod evidence;
mod golden;
mod harness;
mod overload;
mod properties;
mod repeats;
mod rules;
mod schedules;
mod starting;
mod time;
