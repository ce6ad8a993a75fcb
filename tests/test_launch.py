"""launch/: what each file hands to its launcher, and a run under a Slurm of the test's own on this machine."""

import contextlib
import getpass
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from quick import QUICK

from sde_diffusion.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
COMMAND = ["python", "-m", "sde_diffusion.main"]
CONFIG = """
from sde_diffusion.config import experiment


def get_config():
    return experiment(
        data=dict(name="gaussian_mixture_2d"),
        model=dict(name="mlp", width=16, depth=1),
        train=dict(batch_size=16, num_steps={}, log_every=2, checkpoint_every=10**6, sample_every=10**6),
        sample=dict(num=8, batch_size=8, num_steps=2),
        eval=dict(num_examples=8, batch_size=8, ode=False, bound_draws=2, gaussian_mixture=False),
    )
"""


def environment(**more):
    """A user's: one device for each process, `python` is this one, and none of another launcher's variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    path = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])}
    python = {"PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}
    return {**env, **path, **python, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", **more}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(what, condition, seconds, tell=lambda: ""):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{tell()}"
        time.sleep(0.1)
    return value


@contextlib.contextmanager
def started(commands, folder):
    """The processes of pairs (command, environment), each with its output in folder/INDEX.txt; killed at the end."""
    processes = []
    try:
        for index, (command, env) in enumerate(commands):
            with (folder / f"{index}.txt").open("w") as log:
                processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_pod.sh"])
def test_the_scripts_parse(script):
    assert os.access(LAUNCH / script, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# Slurm


@pytest.fixture
def slurm():
    """A controller, a node and munge of the test's own, on the loopback; yields the environment in which sbatch finds them."""
    paths = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    programs = {name: shutil.which(name, path=paths) for name in ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"Slurm is not installed here: no {', '.join(missing)} (Debian: slurm-wlm and munge)")
    # Not in pytest's folder: a socket's name is short, and munge wants its folders open to all.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    user, host = getpass.getuser(), socket.gethostname()
    (folder / "slurm.conf").write_text(f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={free_port()}
        SlurmdPort={free_port()}
        SlurmUser={user}
        SlurmdUser={user}
        AuthType=auth/munge
        CredType=cred/munge
        AuthInfo=socket={folder}/munge.socket,cred_expire=5
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd.pid
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        MpiDefault=none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        SlurmdParameters=config_overrides
        SchedulerParameters=sched_interval=1,batch_sched_delay=0
        ReturnToService=2
        KillWait=5
        NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} CPUs=2 State=UNKNOWN
        PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
    """)
    env = environment(SLURM_CONF=str(folder / "slurm.conf"))
    daemons = []

    def start(name, *arguments):
        with (folder / f"{name}.log").open("w") as log:
            command = [programs[name], *map(str, arguments)]
            daemons.append(subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT))

    def logs():
        return "\n".join(f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in folder.glob("*.log"))

    def idle():
        node = subprocess.run([programs["scontrol"], "show", "node", "localhost"], env=env, capture_output=True, text=True)
        return "State=IDLE" in node.stdout and "NOT_RESPONDING" not in node.stdout

    try:
        start("munged", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={key}", f"--pid-file={folder}/munged.pid",
              f"--seed-file={folder}/munge.seed", "--num-threads=1")  # fmt: skip
        try:
            wait_for("munge", (folder / "munge.socket").exists, 10)
            start("slurmctld", "-D")
            start("slurmd", "-D", "-N", "localhost")
            wait_for("node", idle, 20)
        except AssertionError as error:
            pytest.skip(f"Slurm does not start here: {error}\n{logs()}")
        yield env
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            subprocess.run([programs["scancel"], "--quiet", f"--user={user}"], env=env, timeout=5)
            wait_for("idle node", idle, 8)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # A job's processes are the daemons' children no longer.
        for process in started_in(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def started_in(folder):
    """The processes whose environment names the folder."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in path.read_bytes():
                yield int(path.parent.name)


@pytest.mark.slow
def test_slurm_runs_stops_saves_and_goes_on(slurm, tmp_path):
    """The file as it is: two processes, stopped as by the time limit, queued again by themselves, and finished."""
    config, workdir, output = tmp_path / "config.py", tmp_path / "run", tmp_path / "output.txt"
    config.write_text(CONFIG.format(10**6))

    def tell():
        return output.read_text(errors="replace")[-3000:] if output.exists() else "no output"

    def call(*command):
        done = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={output}"]
    job = call("sbatch", "--parsable", *options, "launch/slurm.sh", f"--config={config}", f"--workdir={workdir}")

    def state():
        text = call("scontrol", "--oneliner", "show", "job", job)
        state, restarts = (re.search(rf"{key}=(\w+)", text).group(1) for key in ("JobState", "Restarts"))
        assert state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), f"{text}\n{tell()}"
        return state, int(restarts)

    metrics = workdir / "metrics.jsonl"
    wait_for("line of metrics", lambda: state() and metrics.exists() and metrics.stat().st_size, 120, tell)
    call("scancel", "--signal=TERM", job)  # to the processes of the step, as --signal=TERM@120 sends it
    wait_for("second place in the queue", lambda: state() == ("PENDING", 1), 60, tell)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        stopped = checkpoints.latest_step()
    assert stopped and stopped % 2 == 0, tell()
    # The same command goes on, to an end that is near now. Slurm waits for some seconds before it starts a job again.
    config.write_text(CONFIG.format(stopped + 6))
    wait_for("end", lambda: state() == ("COMPLETED", 1), 120, tell)

    text = output.read_text()
    assert f"2 cpu device(s) of 2 processes; steps 0 to {10**6:,}" in text, text
    assert f"2 cpu device(s) of 2 processes; steps {stopped:,} to {stopped + 6:,}" in text, text
    assert text.count("stopped by SIGTERM") == 2 and text.count("held-out bits/dim") == 1
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, stopped + 7, 2))
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() and row["devices"] == 2 for row in rows)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == stopped + 6


def test_a_signal_before_training_ends_a_process_that_has_met_the_others():
    """JAX's own handler of SIGTERM would let it go on."""
    code = (
        "import os, signal, sys; from absl import flags; from sde_diffusion import main; flags.FLAGS(sys.argv[:1]); "
        "main._join_processes(); print('met', flush=True); os.kill(os.getpid(), signal.SIGTERM); print('went on')"
    )
    env = environment(JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}", JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("met\n", -signal.SIGTERM), done.stderr[-2000:]


@pytest.mark.slow
def test_a_signal_after_training_ends_a_process_that_others_wait_for(tmp_path):
    """An orderly end would wait for process 0, which waits for process 1 in a computation."""
    (tmp_path / "config.py").write_text(CONFIG.format(4))
    code = """
import os, signal, types
import jax, numpy as np
from absl import app
from jax.experimental import multihost_utils
from sde_diffusion import evaluate, main, train

def evaluated(*_):
    multihost_utils.process_allgather(np.zeros(1))
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    multihost_utils.process_allgather(np.zeros(1))

train.train = lambda *_: types.SimpleNamespace(step=0, ema=None)
evaluate.evaluate = evaluated
app.run(main.main, flags_parser=main.parse)
"""
    command = [sys.executable, "-c", code, f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    common = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    with started([(command, environment(**common, JAX_PROCESS_ID=str(index))) for index in range(2)], tmp_path) as processes:
        assert processes[1].wait(60) == 128 + signal.SIGTERM  # a launcher ends process 0 then, or JAX's heartbeat does


# Cloud TPU


def test_the_tpu_script_starts_the_command_on_every_worker(tmp_path):
    """With a `gcloud` that records what it is asked and a `python` that prints its arguments."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for path, body in ((tmp_path / "bin" / "gcloud", 'for word in "$@"; do printf "%s\\0" "$word"; done >> "$RECORD"'),
                       (python, 'printf "%s\\n" python "$@"')):  # fmt: skip
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    script = tmp_path / "tpu_pod.sh"
    edited, count = re.subn("^CLONE=.*$", f"CLONE={tmp_path / 'clone'}", (LAUNCH / "tpu_pod.sh").read_text(), flags=re.M)
    assert count == 1
    script.write_text(edited)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}

    def asked(*arguments):
        (tmp_path / "record").unlink(missing_ok=True)
        subprocess.run(["bash", script, *arguments], env=env, check=True)
        *words, command = (tmp_path / "record").read_text().rstrip("\0").split("\0")
        assert words == ["compute", "tpus", "tpu-vm", "ssh", "my-slice", "--zone=us-central2-b", "--worker=all"]
        assert command.startswith("--command=")
        return command.removeprefix("--command=")

    arguments = ["--config=configs/vp_cifar.py", "--workdir=/shared/a run", "--config.model.multipliers=(1,2)"]
    done = subprocess.run(["bash", "-c", asked(*arguments)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*COMMAND, "--distributed", *arguments]

    stop = shlex.split(asked("stop"))
    assert stop[:3] == ["pkill", "-TERM", "-f"]
    # It ends the run, and not the shell that was handed the line.
    assert re.search(stop[3], " ".join(COMMAND)) and not re.search(stop[3], asked("stop"))


# Kubernetes


def closed(required=(), **properties):
    """The schema of an object of these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def listed(item):
    return {"type": "array", "items": item, "minItems": 1}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}

# The fields that launch/jobset.yaml uses or may well be given, by the types of JobSet v1alpha2, batch/v1 and core/v1.
CONTAINER = closed(
    ["name", "image", "command"], name=NAME, image=TEXT, command=listed(TEXT), args=listed(TEXT), workingDir=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    env=listed({"oneOf": [
        closed(["name", "value"], name=TEXT, value=TEXT),
        closed(["name", "valueFrom"], name=TEXT, valueFrom=closed(["fieldRef"], fieldRef=closed(["fieldPath"], fieldPath=TEXT))),
    ]}),
    ports=listed(closed(["containerPort"], containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=closed(limits={"type": "object"}, requests={"type": "object"}),
    volumeMounts=listed(closed(["name", "mountPath"], name=NAME, mountPath=TEXT, readOnly=FLAG)),
)  # fmt: skip
POD = closed(
    ["containers", "restartPolicy"], restartPolicy={"enum": ["Never"]},  # podFailurePolicy allows no other
    terminationGracePeriodSeconds=NUMBER, nodeSelector={"type": "object"}, tolerations={"type": "array"},
    containers=listed(CONTAINER),
    volumes=listed(closed(["name"], name=NAME, emptyDir={"type": "object"},
                          persistentVolumeClaim=closed(["claimName"], claimName=TEXT))),
)  # fmt: skip
EXIT_CODES = closed(
    ["operator", "values"], containerName=NAME, operator={"enum": ["In", "NotIn"]}, values=listed({"type": "integer", "minimum": 1})
)
JOB = closed(
    ["template"], completionMode={"enum": ["Indexed"]}, parallelism=NUMBER, completions=NUMBER, backoffLimit=NUMBER,
    activeDeadlineSeconds=NUMBER,
    podFailurePolicy=closed(["rules"], rules=listed(closed(
        ["action", "onExitCodes"], action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}, onExitCodes=EXIT_CODES))),
    template=closed(["spec"], metadata={"type": "object"}, spec=POD),
)  # fmt: skip
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"]
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "jobset.x-k8s.io/v1alpha2"}, kind={"const": "JobSet"},
    metadata=closed(["name"], name=NAME, namespace=NAME, labels={"type": "object"}, annotations={"type": "object"}),
    spec=closed(
        ["replicatedJobs"], network=closed(enableDNSHostnames=FLAG, subdomain=NAME, publishNotReadyAddresses=FLAG),
        suspend=FLAG, ttlSecondsAfterFinished=NUMBER,
        failurePolicy=closed(
            maxRestarts=NUMBER, restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules=listed(closed(["name", "action"], name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                action={"enum": ACTIONS}, onJobFailureReasons=listed({"enum": REASONS}),
                                targetReplicatedJobs=listed(NAME))),
        ),
        replicatedJobs=listed(closed(["name", "template"], name=NAME, replicas=NUMBER,
                                     template=closed(["spec"], metadata={"type": "object"}, spec=JOB))),
    ),
)  # fmt: skip


@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def parts(jobset):
    """(the replicated job, its spec, its container) of a JobSet of one."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return replicated, job, container


def test_the_jobset_keeps_to_the_schema(jobset):
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(jobset, JOBSET)
    _, _, container = parts(jobset)
    container["env"][0]["value"] = 2  # every value of the environment is text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, JOBSET)


def test_the_job_keeps_to_kubernetes_own_schema(jobset):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    replicated, _, _ = parts(jobset)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run"}, **replicated["template"]}
    validator.validate(job, validator.latest_version(), strict=True)


def test_the_jobset_says_one_thing_throughout(jobset):
    replicated, job, container = parts(jobset)
    env = {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}
    assert replicated["replicas"] == 1 and job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(env["JAX_NUM_PROCESSES"]) > 1
    assert env["JAX_PROCESS_ID"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # Pod 0 of job 0, in the subdomain that JobSet makes: JOBSET-REPLICATED-0-0.JOBSET.
    host, _, port = env["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert jobset["spec"]["network"]["enableDNSHostnames"] and "subdomain" not in jobset["spec"]["network"]
    assert host == f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    assert int(port) in [p["containerPort"] for p in container["ports"]]

    assert container["command"] == COMMAND and " ".join(COMMAND) in (ROOT / "README.md").read_text()
    flags = dict(a.lstrip("-").split("=") for a in container["args"])
    assert (ROOT / "configs" / f"{flags['config']}.py").is_file()
    (mount,), (volume,) = container["volumeMounts"], job["template"]["spec"]["volumes"]
    assert mount["name"] == volume["name"] and flags["workdir"].startswith(mount["mountPath"] + "/")
    # A name to fill in: no registry.
    assert container["image"] == "YOUR_IMAGE"


def test_a_pod_that_was_stopped_goes_on_and_a_wrong_flag_does_not(jobset):
    _, job, container = parts(jobset)
    rules = job["podFailurePolicy"]["rules"]
    assert all(r["onExitCodes"]["containerName"] == container["name"] and r["onExitCodes"]["operator"] == "In" for r in rules)
    actions = {code: rule["action"] for rule in rules for code in rule["onExitCodes"]["values"]}
    assert actions == {128 + signal.SIGTERM: "Ignore", 2: "FailJob"}
    # What is left fails the job at once, and then all pods start again, but for the wrong flag.
    assert job["backoffLimit"] == 0 and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.slow
def test_the_pods_of_the_jobset_meet_and_train(jobset, tmp_path):
    """Each pod's command in its environment, on this machine, under the coordinator's name here."""
    _, job, container = parts(jobset)
    (tmp_path / "config.py").write_text(CONFIG.format(4))
    command = [*container["command"], f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    here = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "KUBERNETES_SERVICE_HOST": "127.0.0.1"}
    pods = [{e["name"]: e.get("value", str(index)) for e in container["env"]} | here for index in range(job["completions"])]
    with started([(command, environment(**pod)) for pod in pods], tmp_path) as processes:
        for process in processes:
            process.wait(180)
    texts = [(tmp_path / f"{index}.txt").read_text() for index in range(len(processes))]
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(t[-2000:] for t in texts)
    assert f"of {len(processes)} processes; steps 0 to 4" in texts[0] and "held-out bits/dim" not in texts[1]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(row["loss"]) for row in rows)
