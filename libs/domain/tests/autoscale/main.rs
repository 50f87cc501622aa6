//! The autoscale engine against its specification: what documents it refuses, what rules decide,
//! when schedules hold, and what is true of every decision.

#![allow(clippy::unwrap_used)]

mod compile;
mod golden;
mod properties;
mod rules;
mod scene;
mod schedules;
mod time;
