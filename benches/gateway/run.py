#!/usr/bin/env python3
"""The gateway compared with nginx: CPU microseconds per request, measured in one run.

W1: plain proxying of 1 KiB both ways. W2: the same with key authentication and a 90/10 split.
The system under test runs alone on CPU 0, with one worker or thread; the instance and the load run on
CPU 1. A round measures every system once, in turn (A B A B ...); ratios are computed within a round,
and their median is reported with a bootstrap interval. Each round restarts all processes.

A round is rejected and repeated if another process took more than 5 % of the CPU time during a
measurement, or if any response was not 2xx. Processes are stopped by the id recorded when they were
started.

With --beside PATH another build of the gateway (an example `gateway_bench` of another commit) is
measured in the same rounds; it is the denominator of the last ratios.

Instructions per request are counted too, by callgrind (instructions.py): this needs neither a clock
nor a second core, and works on a busy machine.

    benches/gateway/run.py                       the real run: 7 rounds of 10 s
    benches/gateway/run.py --only instructions --beside OTHER/gateway_bench
    benches/gateway/run.py --rounds 3 --seconds 2 --no-refusal      while working on the code
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import instructions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TICK = os.sysconf("SC_CLK_TCK")
KEY = "bench-key-0123456789abcdefghijklmnopqrstuvwxyz"
UPSTREAM_PORT, PORTS = 19300, {"nginx-w1": 19310, "ours-w1": 19311, "nginx-w2": 19312, "ours-w2": 19313}
BESIDE_PORTS = {"beside-w1": 19314, "beside-w2": 19315}
# Maximum increase of the instructions per request.
INSTRUCTIONS_RATIO_MAX = 1.01

UPSTREAM_CONF = """
daemon off; pid {dir}/upstream.pid; error_log {dir}/upstream.err; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; default_type application/json;
  client_body_temp_path {dir}/ub; proxy_temp_path {dir}/up; fastcgi_temp_path {dir}/uf; uwsgi_temp_path {dir}/uu; scgi_temp_path {dir}/us;
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ return 200 '{body}'; }} }}
}}
"""

NGINX_CONF = """
daemon off; pid {dir}/{name}.pid; error_log {dir}/{name}.err; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_buffer_size 64k;
  client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  upstream blue {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  upstream green {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
{maps}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location /endpoints/bench/score {{
{check}
      proxy_pass http://{target}/score; proxy_http_version 1.1; proxy_set_header Connection "";
    }}
  }}
}}
"""

NGINX_W2_MAPS = """
  map_hash_bucket_size 256;
  map $http_authorization $key_ok {{ default 0; "Bearer {key}" 1; "Bearer second-{key}" 1; }}
  split_clients "$connection$connection_requests$msec" $deployment {{ 90% blue; * green; }}
""".format(key=KEY)


def have(tool):
    return shutil.which(tool) or (Path("/usr/sbin") / tool).exists()


def install_tools():
    missing = [tool for tool in ("nginx", "wrk", "valgrind") if not have(tool)]
    if not missing:
        return
    print(f"installing {' '.join(missing)} with apt-get", flush=True)
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    subprocess.run([*sudo, "apt-get", "update", "-qq"], check=False)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # The package would start its own server; this benchmark starts nginx itself.
    subprocess.run([*sudo, "apt-get", "install", "-y", "-qq", *missing], check=True, env=env)


def build():
    if os.environ.get("GATEWAY_BENCH"):
        return os.environ["GATEWAY_BENCH"]
    command = ["cargo", "build", "--profile", "bench", "-p", "penstock-gateway", "--example", "gateway_bench"]
    subprocess.run(command, check=True, cwd=ROOT)
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    return str(Path(target) / "release" / "examples" / "gateway_bench")


class Running:
    """Started processes, by id."""

    def __init__(self):
        self.processes = []

    def start(self, cpu, command, **options):
        process = subprocess.Popen(["taskset", "-c", str(cpu), *command], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE if options.get("pipe") else subprocess.DEVNULL)
        self.processes.append(process)
        return process

    def stop(self):
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def children(pid):
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "children").read_text().split()
        for child in text:
            found += children(int(child))
    return found


def ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def ticks_of_all():
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found[int(entry)] = ticks(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                pass
    return found


def cpu_seconds(pid):
    """CPU time of the process tree, in nanoseconds if available."""
    total = 0
    for member in children(pid):
        for task in Path(f"/proc/{member}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def utime_stime(pid):
    return sum(ticks(member) for member in children(pid)) / TICK


def rss_kib(pid):
    total = 0
    for member in children(pid):
        match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{member}/status").read_text())
        total += int(match.group(1)) if match else 0
    return total


def wait_for(port):
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"nothing listens on port {port} after 10 s")


def check_answer(url):
    """Retries: the route may become available after the port is open."""
    for _ in range(200):
        request = urllib.request.Request(url, data=b"x" * 1024, headers={"authorization": f"Bearer {KEY}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                body = answer.read()
                if answer.status == 200 and len(body) == 1024:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.02)
    raise SystemExit(f"{url} does not answer with 1 KiB")


def refused_without_key(url):
    try:
        urllib.request.urlopen(urllib.request.Request(url, data=b"x"), timeout=5)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    return False


def wrk(url, seconds, connections, script):
    command = ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script, url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    raw = done.stdout
    result = json.loads(re.search(r"^RESULT (.*)$", raw, re.M).group(1))
    result["raw"] = raw
    return result


def write_script(directory):
    path = Path(directory) / "post.lua"
    path.write_text("""
wrk.method = "POST"
wrk.body = string.rep("x", 1024)
wrk.headers["content-type"] = "application/json"
wrk.headers["authorization"] = "Bearer %s"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('RESULT {"requests":%%d,"duration_us":%%d,"status_errors":%%d,"socket_errors":%%d,"p50_us":%%d,"p99_us":%%d}\\n',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99)))
end
""" % KEY)
    return str(path)


def is_softirq(pid):
    """Whether it is the kernel's share of the loopback traffic, which belongs to the load."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("ksoftirqd")
    except OSError:
        return False


def measure(pid, url, options, script, own):
    wrk(url, options.warmup, options.connections, script)
    others_before = ticks_of_all()
    before, classic = cpu_seconds(pid), utime_stime(pid)
    started = time.monotonic()
    result = wrk(url, options.seconds, options.connections, script)
    wall = time.monotonic() - started
    used, classic = cpu_seconds(pid) - before, utime_stime(pid) - classic
    others_after = ticks_of_all()
    ours = set(own())
    loudest = (0.0, 0)
    for other, now in others_after.items():
        # wrk has exited and is not in the list; kernel threads and everything else are.
        if other not in ours and not is_softirq(other):
            share = (now - others_before.get(other, 0)) / TICK / wall
            loudest = max(loudest, (share, other))
    share, who = loudest
    try:
        name = Path(f"/proc/{who}/comm").read_text().strip()
    except OSError:
        name = "?"
    requests = result["requests"]
    return {
        "requests": requests,
        "rps": requests / (result["duration_us"] / 1e6),
        # utime + stime as the scheduler accounts them (schedstat), and as /proc/PID/stat rounds them.
        "us_per_request": used * 1e6 / max(requests, 1),
        "us_per_request_ticks": classic * 1e6 / max(requests, 1),
        "cpu_share": used / wall,
        "p50_us": result["p50_us"],
        "p99_us": result["p99_us"],
        "rss_kib": rss_kib(pid),
        "non_2xx": result["status_errors"],
        "socket_errors": result["socket_errors"],
        "loudest_other": {"share": share, "name": name},
    }


def bootstrap(values, draws=10_000, seed=1):
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(draws * 0.025)], medians[int(draws * 0.975)]


def start_upstream(running, directory):
    upstream = Path(directory) / "upstream.conf"
    upstream.write_text(UPSTREAM_CONF.format(dir=directory, port=UPSTREAM_PORT, body="y" * 1024))
    running.start(1, ["nginx", "-p", directory, "-c", str(upstream)])
    wait_for(UPSTREAM_PORT)


def gateway_commands(binaries):
    """System -> (command, port, key or none)."""
    commands = {}
    for system, binary in binaries.items():
        for workload, key, more in [("w1", None, []), ("w2", KEY, ["--key", KEY, "--split", "90/10"])]:
            name = f"{system}-{workload}"
            port = {**PORTS, **BESIDE_PORTS}[name]
            command = [binary, "--port", str(port), "--upstream", f"127.0.0.1:{UPSTREAM_PORT}", "--threads", "1", *more]
            commands[name] = (command, port, key)
    return commands


def start_all(running, options, directory, binaries):
    start_upstream(running, directory)
    systems = {}
    for name, maps, check, target in [
        ("nginx-w1", "", "", "blue"),
        ("nginx-w2", NGINX_W2_MAPS, "      if ($key_ok = 0) { return 401; }", "$deployment"),
    ]:
        conf = Path(directory) / f"{name}.conf"
        conf.write_text(NGINX_CONF.format(dir=directory, name=name, port=PORTS[name], upstream=UPSTREAM_PORT, maps=maps, check=check, target=target))
        systems[name] = running.start(0, ["nginx", "-p", directory, "-c", str(conf)]).pid
    for name, (command, _, _) in gateway_commands(binaries).items():
        systems[name] = running.start(0, command).pid
    for name in systems:
        url = url_of(name)
        wait_for({**PORTS, **BESIDE_PORTS}[name])
        check_answer(url)
        if name.endswith("w2") and not refused_without_key(url):
            raise SystemExit(f"{name} answers without a key")
    return systems


def url_of(name):
    return f"http://127.0.0.1:{({**PORTS, **BESIDE_PORTS})[name]}/endpoints/bench/score"


def one_round(systems, options, script, own):
    order = ["ours-w1", "beside-w1", "nginx-w1", "ours-w2", "beside-w2", "nginx-w2"]
    return {name: measure(systems[name], url_of(name), options, script, own) for name in order if name in systems}


def fresh_round(options, directory, script, binaries):
    """Restarts all processes in each round: memory layout varies by a few percent between processes, and
    would otherwise look like a difference between the systems."""
    running = Running()
    try:
        systems = start_all(running, options, directory, binaries)
        own = lambda: [os.getpid(), *(pid for process in running.processes for pid in children(process.pid))]
        return one_round(systems, options, script, own)
    finally:
        running.stop()


def why_refused(results, options):
    for name, result in results.items():
        if result["non_2xx"] or result["socket_errors"]:
            return f"{name}: {result['non_2xx']} answers were not 2xx, {result['socket_errors']} socket errors"
        loud = result["loudest_other"]
        if loud["share"] > 0.05 and not options.no_refusal:
            return f"{name}: {loud['name']} took {loud['share']:.0%} of a CPU"
    return None


COMPARED = [
    ("W1 ours / nginx W1", "ours-w1", "nginx-w1", 1.00),
    ("W2 ours / nginx W2", "ours-w2", "nginx-w2", 1.05),
    ("W2 ours / nginx W1", "ours-w2", "nginx-w1", None),
    ("W2 ours / W1 ours", "ours-w2", "ours-w1", None),
    ("W1 ours / beside", "ours-w1", "beside-w1", 1.05),
    ("W2 ours / beside", "ours-w2", "beside-w2", 1.05),
]


def report(rounds):
    lines = ["", f"{'system':<10} {'us/request':>11} {'requests/s':>11} {'p50 us':>8} {'p99 us':>8} {'RSS MiB':>8}   medians of {len(rounds)} rounds"]
    for name in rounds[0]:
        of = lambda key: statistics.median(r[name][key] for r in rounds)
        lines.append(f"{name:<10} {of('us_per_request'):>11.2f} {of('rps'):>11.0f} {of('p50_us'):>8.0f} {of('p99_us'):>8.0f} {of('rss_kib') / 1024:>8.1f}")
    lines.append("")
    summary = {}
    for title, a, b, bar in COMPARED:
        if b not in rounds[0]:
            continue
        ratios = [r[a]["us_per_request"] / r[b]["us_per_request"] for r in rounds]
        low, high = bootstrap(ratios)
        middle = statistics.median(ratios)
        # Of another build it has to be shown that this one is slower.
        checked = low if b.startswith("beside") else middle
        verdict = "" if bar is None else f"  at most {bar:.2f}: {'holds' if checked <= bar else 'DOES NOT HOLD'}"
        lines.append(f"{title:<20} {middle:.3f}  [{low:.3f}, {high:.3f}]{verdict}")
        summary[title] = {"median": middle, "low": low, "high": high, "checked": checked, "bar": bar, "ratios": ratios}
    return "\n".join(lines), summary


def save(rounds, refused, summary, table, counted, lines, options):
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    version = subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr.strip()
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"nginx": version, "cpu": cpu, "kernel": os.uname().release, "commit": commit, 
             "options": {name: value for name, value in vars(options).items() if name not in ("out", "beside")}}
    if counted:
        document = {"about": about, "instructions": counted}
        (out / "instructions.json").write_text(json.dumps(document, indent=1) + "\n")
        (out / "instructions.txt").write_text("\n".join(lines).strip() + "\n")
    if not rounds:
        return
    document = {"about": about, "summary": summary, "rounds": rounds, "refused": refused}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "table.txt").write_text(table.strip() + "\n")
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        keys = ["us_per_request", "us_per_request_ticks", "requests", "rps", "p50_us", "p99_us", "cpu_share", "rss_kib"]
        writer.writerow(["round", "system", *keys])
        for number, results in enumerate(rounds, 1):
            for name, result in results.items():
                writer.writerow([number, name, *(result[key] for key in keys)])


def count_instructions(options, directory, binaries):
    running = Running()
    try:
        start_upstream(running, directory)
        ready = lambda port: (wait_for(port), check_answer(f"http://127.0.0.1:{port}/endpoints/bench/score"))
        counts = instructions.compare(gateway_commands(binaries), options.counts, ready)
        return instructions.table(counts, options.instructions_max)
    finally:
        running.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3, help="seconds before each measurement")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--retries", type=int, default=14, help="maximum number of rejected rounds to repeat")
    parser.add_argument("--no-refusal", action="store_true", help="accept rounds despite other processes")
    parser.add_argument("--beside", metavar="PATH", help="another build of the example gateway_bench, measured in the same rounds")
    parser.add_argument("--only", choices=["time", "instructions"], help="run only this half")
    parser.add_argument("--counts", type=int, default=3, help="number of instruction counts")
    parser.add_argument("--instructions-max", type=float, default=INSTRUCTIONS_RATIO_MAX, metavar="RATIO",
                        help="instructions compared with --beside; more fails")
    parser.add_argument("--out", default=str(HERE / "results"))
    options = parser.parse_args()
    if os.cpu_count() < 2:
        raise SystemExit("the benchmark needs two CPUs: one for the system under test, one for the load")
    install_tools()
    binaries = {"ours": build()}
    if options.beside:
        binaries["beside"] = str(Path(options.beside).resolve(strict=True))
    rounds, refused, lines, counted, holds = [], [], [], None, True
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        script = write_script(directory)
        if options.only != "time":
            lines, counted, holds = count_instructions(options, directory, binaries)
            print("\n".join(lines), flush=True)
        while options.only != "instructions" and len(rounds) < options.rounds:
            results = fresh_round(options, directory, script, binaries)
            reason = why_refused(results, options)
            if reason is None:
                rounds.append(results)
                cells = "  ".join(f"{name} {result['us_per_request']:.2f}" for name, result in results.items())
                print(f"round {len(rounds)}: us/request  {cells}", flush=True)
                continue
            refused.append({"reason": reason, "results": results})
            print(f"refused: {reason}", flush=True)
            if len(refused) > options.retries:
                raise SystemExit(f"{len(refused)} rounds were refused; run it on a quiet machine, or with --no-refusal to look at it anyway")
    table, summary = report(rounds) if rounds else ("", {})
    print(table)
    save(rounds, refused, summary, table, counted, lines, options)
    missed = [title for title, s in summary.items() if s["bar"] and s["checked"] > s["bar"]]
    return 1 if missed or not holds else 0


if __name__ == "__main__":
    sys.exit(main())
