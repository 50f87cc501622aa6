# The entry point for people and CI: every task has a target. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo run test check check-licenses check-unused advisories bench bench-decisions bench-endpoints bench-gateway bench-log bench-start test-servers sim fuzz faults away schemas stack-up stack-down clean

# A newly installed toolchain may not be on PATH yet.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-16s %s\n", $$1, $$2 }'

demo: ## Build, start, replay an hour of real load in a minute, show the results, stop
	@scripts/setup.sh
	@scripts/demo.sh

run: ## Build and start the same, and keep running until Ctrl-C
	@scripts/setup.sh
	@scripts/demo.sh --stay

test: ## Run every test suite (installs prerequisites, including servers); PENSTOCK_SKIP=kafka,postgres,python skips those
	@scripts/setup.sh stack
	# End-to-end tests run the real binaries.
	cargo build --locked --workspace --bins
	cargo test --locked --workspace --no-fail-fast

test-servers: ## Serve real model servers (MLflow, Triton's clients, OpenAI's, …) with their own clients; installs 7 GB; ARGS=--only mlflow,litserve, --update-readme
	@scripts/setup.sh
	@python3 -c 'import venv, ensurepip' 2>/dev/null || { echo "test-servers: Python's venv module is missing; install python3-venv with your package manager" >&2; exit 1; }
	cargo build --locked --release --bin penstock
	tests/compat/run.py $(ARGS)

check: ## Formatting and lints; warnings are errors
	@scripts/setup.sh check kafka
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@# Together they enable features for each other; these are also built alone.
	cargo check --locked -p penstock-cli -p penstock-gateway
	@scripts/compose.sh

check-licenses: ## Licences, bans and sources of all dependencies (deny.toml)
	@scripts/setup.sh
	@scripts/deny.sh licenses bans sources

check-unused: ## Unused dependencies
	@scripts/setup.sh
	@scripts/unused.sh

advisories: ## Known vulnerabilities in dependencies (fetches the advisory database)
	@scripts/setup.sh
	@scripts/deny.sh advisories

bench: ## Rule evaluations per second of the pure evaluator
	@scripts/setup.sh
	cargo bench --locked -p penstock-domain --bench evaluate
	@echo "Also: make bench-decisions (seconds from load to decision), make bench-endpoints (cost of one more), make bench-gateway (CPU per request compared with nginx)"

bench-decisions: ## Latency from load to decision, embedded and through Kafka; SECONDS= for the length of the second part
	@scripts/setup.sh stack
	cargo bench --locked -p penstock --bench decisions

bench-endpoints: ## Memory and CPU of one more endpoint at 100, 1,000 and 10,000, on an idle machine; ARGS=
	@scripts/setup.sh
	@command -v python3 >/dev/null || { echo "bench-endpoints: python3 is missing; install it with your package manager" >&2; exit 1; }
	benches/endpoints/run.py $(ARGS)

bench-gateway: ## CPU and instructions per request compared with nginx, on an idle machine (installs nginx, wrk, valgrind); ARGS=--beside PATH, --only instructions
	@scripts/setup.sh
	@command -v python3 >/dev/null || { echo "bench-gateway: python3 is missing; install it with your package manager" >&2; exit 1; }
	benches/gateway/run.py $(ARGS)

bench-log: ## The log compared with the limits of SQLite, PostgreSQL and Kafka, and its replay; ARGS=PARTS ROUNDS= EVENTS= BACKLOG= REPLAY=
	@scripts/setup.sh stack
	cargo bench --locked -p penstock --bench log -- $(ARGS)

bench-start: ## Starts on a log of 5 million events, and takeovers, on an idle machine (an hour, 45 GB of disk); ARGS=--beside PATH, --events, --only start
	@scripts/setup.sh stack
	@command -v python3 >/dev/null || { echo "bench-start: python3 is missing; install it with your package manager" >&2; exit 1; }
	benches/start/run.py $(ARGS)

sim: ## Long simulation: COUNT= runs starting at SEED= (200 from a random seed)
	@scripts/setup.sh
	@export SEED=$${SEED:-$$RANDOM} COUNT=$${COUNT:-200}; echo "SEED=$$SEED COUNT=$$COUNT"; \
	cargo test --locked -p penstock-tests --test simulation

fuzz: ## Fuzz documents, events and model responses: COUNT= of each starting at SEED= (200000, random)
	@scripts/setup.sh
	@export SEED=$${SEED:-$$RANDOM} COUNT=$${COUNT:-200000}; echo "SEED=$$SEED COUNT=$$COUNT"; \
	cargo test --locked -p penstock-tests --test fuzz && \
	PROPTEST_CASES=$$COUNT cargo test --locked -p penstock-gateway --lib upstream

faults: ## Long fault run on a real PostgreSQL and a real Kafka: COUNT= faults from SEED=, BROKERS=, OVERLAP= at a time, ONLY= kinds (300, random, 3, 4, all)
	@scripts/setup.sh stack
	@export SEED=$${SEED:-$$RANDOM} COUNT=$${COUNT:-300} BROKERS=$${BROKERS:-3} CONVERGENCE_SECONDS=$${CONVERGENCE_SECONDS:-30}; \
	cargo build --locked --workspace --bins && \
	cargo test --locked -p penstock --test stack -- faults_suite:: --nocapture

away: ## Gateways serve while PostgreSQL and Kafka are both down: AWAY_SECONDS= (60)
	@scripts/setup.sh stack
	@export AWAY_SECONDS=$${AWAY_SECONDS:-60}; \
	cargo build --locked --workspace --bins && \
	cargo test --locked -p penstock --test stack -- separate_processes::gateways_serve --nocapture

schemas: ## Regenerate schemas/ from the code; review the diff before committing
	@scripts/setup.sh
	UPDATE_GOLDEN=1 cargo test --locked -p penstock-control --test openapi

stack-up: ## Start a real PostgreSQL and a real Kafka in .stack/ (BROKERS=3 for three); .stack/env names them
	@scripts/setup.sh stack
	@scripts/stack/stack.sh up

stack-down: ## Stop them and remove .stack/
	@scripts/stack/stack.sh down

clean: ## Remove all build output
	cargo clean
