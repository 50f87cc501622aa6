#!/usr/bin/env bash
# Apache Kafka (KRaft) from its published Maven artifacts, without an installation.
#
#   kafka.sh jars                                prints the folder with the jars; downloads them with Maven the first time
#   kafka.sh run FOLDER ID PORT CONTROLLER VOTERS
#                                                formats FOLDER if it is new and runs a broker there, in the foreground
#   kafka.sh answers FOLDER PORT                 succeeds if the broker in FOLDER has started and answers a request
#
# VOTERS is `1@127.0.0.1:PORT[,2@…]`: ids and controller ports of all brokers. Everything listens on loopback only.
# KAFKA_FRONTS=LISTEN:ADVERTISED[,…] adds listeners that are advertised with another port, that of a proxy. The nth
# listeners of all brokers belong together.
# KAFKA_SECURED=PORT,PORT,FOLDER adds two with TLS: the first requires a password (PLAIN or SCRAM-SHA-512), the second a
# client certificate. FOLDER has server.pem (key and certificate), ca.pem, and user (`NAME PASSWORD`).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=4.1.0
jars=${XDG_CACHE_HOME:-$HOME/.cache}/penstock/kafka-$version
# A cluster id in Kafka's format; data folders are private, so a constant is sufficient.
cluster=cGVuc3RvY2stc3RhY2stMQ

fail() {
  echo "kafka: $*" >&2
  exit 1
}

need() {
  command -v "$1" >/dev/null ||
    fail "there is no $1, which the Kafka broker of the tests needs. Run scripts/setup.sh stack, or install $2." \
      "To do without, name kafka in PENSTOCK_SKIP"
}

# Several test programs may need them concurrently: one downloads, the others wait.
fetch_jars() {
  [ -d "$jars/lib" ] && return
  need mvn maven
  mkdir -p "$jars"
  exec 9>"$jars/lock"
  flock 9
  if [ ! -d "$jars/lib" ]; then
    echo "kafka: downloading Apache Kafka $version into $jars (43 MB, once)" >&2
    rm -rf "$jars/partial"
    mvn -B -q -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$jars/partial" >&2 ||
      fail "Maven could not download Apache Kafka $version, see above. To skip these tests, set PENSTOCK_SKIP=kafka"
    mv "$jars/partial" "$jars/lib"
  fi
  exec 9>&-
}

# Small and quick to start: the broker holds only test data.
java_options=(-Xmx384m -Xss512k -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData -XX:CICompilerCount=1
  -Dlog4j2.disable.jmx=true)

properties() {
  local id=$1 port=$2 controller=$3 voters=$4 brokers factor=1 in_sync=1 listeners="" known="" protocols="" front nth=0
  # Clients see the brokers that have a listener of the same name.
  for front in $(tr ',' ' ' <<<"${KAFKA_FRONTS:-}"); do
    nth=$((nth + 1))
    listeners+=",FRONT$nth://127.0.0.1:${front%:*}"
    known+=",FRONT$nth://127.0.0.1:${front#*:}"
    protocols+=",FRONT$nth:PLAINTEXT"
  done
  if [ -n "${KAFKA_SECURED:-}" ]; then
    local by_password by_certificate secrets name password
    IFS=, read -r by_password by_certificate secrets <<<"$KAFKA_SECURED"
    read -r name password <"$secrets/user"
    listeners+=",PASSWORD://127.0.0.1:$by_password,CERTIFICATE://127.0.0.1:$by_certificate"
    known+=",PASSWORD://127.0.0.1:$by_password,CERTIFICATE://127.0.0.1:$by_certificate"
    protocols+=",PASSWORD:SASL_SSL,CERTIFICATE:SSL"
    secured
  fi
  brokers=$(tr ',' '\n' <<<"$voters" | wc -l)
  if [ "$brokers" -ge 3 ]; then
    factor=3
    in_sync=2
  fi
  cat <<PROPERTIES
process.roles=broker,controller
node.id=$id
controller.quorum.voters=$voters
listeners=CLIENT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller$listeners
advertised.listeners=CLIENT://127.0.0.1:$port$known
listener.security.protocol.map=CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT$protocols
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
log.dirs=$folder/data
auto.create.topics.enable=false
default.replication.factor=$factor
min.insync.replicas=$in_sync
offsets.topic.replication.factor=$factor
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=$factor
transaction.state.log.min.isr=$in_sync
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
# A killed broker is detected in five seconds instead of nine; with less, a busy machine would lose live ones.
broker.session.timeout.ms=5000
broker.heartbeat.interval.ms=500
num.network.threads=1
num.io.threads=2
num.replica.fetchers=1
background.threads=2
num.recovery.threads.per.data.dir=1
log.cleaner.dedupe.buffer.size=2097152
log.index.size.max.bytes=1048576
PROPERTIES
}

secured() {
  local login=org.apache.kafka.common.security
  cat <<PROPERTIES
ssl.keystore.type=PEM
ssl.keystore.location=$secrets/server.pem
ssl.truststore.type=PEM
ssl.truststore.location=$secrets/ca.pem
listener.name.certificate.ssl.client.auth=required
listener.name.password.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512
listener.name.password.plain.sasl.jaas.config=$login.plain.PlainLoginModule required user_$name="$password";
listener.name.password.scram-sha-512.sasl.jaas.config=$login.scram.ScramLoginModule required;
PROPERTIES
}

run() {
  local scram=() name password
  folder=$1
  java=(java "${java_options[@]}" "-Dpenstock.folder=$folder" "-Dlog4j2.configurationFile=$here/log4j2.properties"
    -cp "$jars/lib/*")
  need java openjdk-17-jre-headless
  fetch_jars
  mkdir -p "$folder"
  properties "$2" "$3" "$4" "$5" >"$folder/server.properties"
  if [ ! -f "$folder/data/meta.properties" ]; then
    if [ -n "${KAFKA_SECURED:-}" ]; then
      read -r name password <"${KAFKA_SECURED##*,}/user"
      scram=(--add-scram "SCRAM-SHA-512=[name=$name,password=$password]")
    fi
    "${java[@]}" kafka.tools.StorageTool format -t "$cluster" -c "$folder/server.properties" "${scram[@]+"${scram[@]}"}" >"$folder/format.log" 2>&1 ||
      fail "could not format $folder/data: $(tail -n 3 "$folder/format.log")"
  fi
  : >"$folder/broker.log"
  exec "${java[@]}" kafka.Kafka "$folder/server.properties"
}

# ApiVersions, version 0: length 10, key 18, version 0, correlation 1, no client id.
answers() {
  grep -q 'Kafka Server started' "$1/broker.log" 2>/dev/null || return 1
  exec 3<>"/dev/tcp/127.0.0.1/$2" || return 1
  printf '\0\0\0\12\0\22\0\0\0\0\0\1\377\377' >&3
  [ "$(timeout 5 head -c 8 <&3 | wc -c)" -eq 8 ]
}

case "${1:-}" in
  jars) need java openjdk-17-jre-headless; fetch_jars; echo "$jars/lib" ;;
  run) shift; run "$@" ;;
  answers) shift; answers "$@" 2>/dev/null ;;
  *) fail "usage: kafka.sh jars | run FOLDER ID PORT CONTROLLER VOTERS | answers FOLDER PORT" ;;
esac
