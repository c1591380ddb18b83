#!/usr/bin/env bash
# Expected: after a resume from step 10 (purge_step=10 of torch's SummaryWriter, which writes a session start at that step) every reader of the log drops
# the points that the first process wrote from step 10 on.
# Seen with tensorboard 2.21.0, the first process without a purge_step, as usual: EventAccumulator (scripts) and the web server as started by default
# drop them; the web server with --load_fast=false keeps them, so its curve folds back, because it takes the only session start
# for the run's first. With no session start at all, only the default web server drops them. What agrees in all three: purge_step=0 in the first process.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorboard==2.21.0 2>/dev/null
cat > "$folder/show.py" <<'PY'
import json
import logging
import os
import re
import subprocess
import sys
import time
import urllib.request

import tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

LOGS = sys.argv[1]
RUNS = {"no session start": (None, None), "purge_step 10 in the second": (None, 10), "0 in the first, 10 in the second": (0, 10)}
logging.disable()


def write(folder, steps, purge_step, name):
    writer = EventFileWriter(folder, filename_suffix=name)
    if purge_step is not None:
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=purge_step, session_log=start))
    for step in steps:
        summary = Summary(value=[Summary.Value(tag="loss", simple_value=1.0)])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()


def by_script(run):
    accumulator = EventAccumulator(f"{LOGS}/{run}")
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("loss")]


def by_server(*options):
    """The steps that the web server shows for each run; it has two minutes to load them."""
    command = [f"{os.path.dirname(sys.executable)}/tensorboard", "--logdir", LOGS, "--host", "127.0.0.1", "--port", "0", *options]
    with open(f"{LOGS}.out", "w+") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            steps = {}
            for _ in range(240):
                time.sleep(0.5)
                address = re.search(r"http://\S+/", open(f"{LOGS}.out").read())
                for run in RUNS if address else ():
                    url = f"{address[0]}data/plugin/scalars/scalars?tag=loss&run={run.replace(' ', '%20')}"
                    try:
                        steps[run] = [point[1] for point in json.load(urllib.request.urlopen(url))]
                    except OSError:
                        pass
                if len(steps) == len(RUNS) and all(25 in found for found in steps.values()):
                    break
            return steps
        finally:
            server.terminate()


for run, purges in RUNS.items():
    for name, steps, purge in zip("ab", (range(0, 20, 5), range(10, 30, 5)), purges, strict=True):
        write(f"{LOGS}/{run}", steps, purge, name)
        time.sleep(1.1)  # a file's name holds the second
print(f"tensorboard {tensorboard.__version__}: steps 0 to 15 by the first process, 10 to 25 by the second")
found = {
    "script": {run: by_script(run) for run in RUNS},
    "web, default": by_server(),
    "web, --load_fast=false": by_server("--load_fast=false"),
}
folded = {}
for reader, steps in found.items():
    for run in RUNS:
        folded[reader, run] = steps[run] != sorted(set(steps[run]))
        print(f"{reader}; {run}: {steps[run]}{' folds back' if folded[reader, run] else ''}")
seen = [True, False, False, False, False, False, True, True, False]
assert list(folded.values()) == seen, "the readers agree otherwise now"
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder/logs"
