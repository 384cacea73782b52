"""What is installed: the package, the kernels' sources inside it, and nothing that hides another package."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from grads_dist.commands import prepare

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("grads_dist", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of a wheel that is built from a copy of the checkout, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")}
        copy(ROOT / name, folder / name, **(options if copy is shutil.copytree else {}))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    (path,) = (folder / "out").glob("grads_dist-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_the_kernels(wheel):
    names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "grads_dist").rglob("*.py")}
    assert modules <= names
    assert {"grads_dist/_kernels/cpu/segment_stats.h", "grads_dist/py.typed"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"grads_dist"}


def test_wheel_has_the_entry_point_and_the_licence(wheel):
    files = {name.rpartition("/")[2]: name for name in wheel.namelist() if ".dist-info" in name}
    assert b"grads-dist = grads_dist.cli:main" in wheel.read(files["entry_points.txt"])
    assert b"Apache License" in wheel.read(files["LICENSE"])


def test_kernels_is_no_package():
    # It would hide the package `kernels` that transformers imports.
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    link = ROOT / "grads_dist" / "_kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"


def test_setup_needs_neither_torch_nor_a_compiler(tmp_path):
    blocked = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
    code = blocked + "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_are_built_only_where_there_is_a_compiler(tmp_path):
    for name in ("setup.py", "kernels"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "_cpu_kernels" in done.stdout + done.stderr, done.stderr
    assert not list(tmp_path.rglob("_cpu_kernels*.so"))


def test_requirements_are_ranges():
    project = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    assert "==" not in project and "deepspeed>=0.18" in project
    assert (ROOT / "constraints-cpu.txt").read_text().splitlines()[-1].startswith("torch==")


def test_subpackages_hold_a_docstring_and_nothing_else():
    for path in (ROOT / "grads_dist").glob("*/**/__init__.py"):
        text = path.read_text()
        assert text.startswith('"""') and text.count('"""') == 2 and text.endswith('"""\n'), path


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_nvme", "zero3_offload"])
def test_deepspeed_files(name):
    settings = json.loads((ROOT / "launch" / f"{name}.json").read_text())
    zero = settings["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == name.endswith(("offload", "nvme"))
    assert settings["train_micro_batch_size_per_gpu"] == "auto"
    assert settings["optimizer"]["params"]["lr"] == "auto"


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh", "mpirun.sh", "slurm.sbatch"])
def test_launch_scripts_are_valid_bash(name):
    assert subprocess.run(["bash", "-n", str(ROOT / "launch" / name)]).returncode == 0


def test_slurm_file_fixes_no_nodes():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert not [line for line in options if "nodes" in line or "ntasks" in line or "gpus" in line]
    assert "--kill-on-bad-exit=1" in text


def launch(script: str, *args: str, folder: Path, **variables: str) -> list[str]:
    """The arguments that a launch script gives to its launcher."""
    for name in ("torchrun", "deepspeed", "mpiexec"):
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"} | variables
    command = ["bash", str(ROOT / "launch" / script), *args]
    return subprocess.run(command, env=environment, check=True, text=True, capture_output=True).stdout.split()


def test_launch_scripts_pass_arguments_on(tmp_path):
    ours = ["run", "--config", "c.yaml"]
    assert launch("torchrun.sh", *ours, folder=tmp_path, NPROC="3") == [
        "--nproc-per-node", "3", "--standalone", "-m", "grads_dist", *ours
    ]  # fmt: skip
    several = launch("torchrun.sh", *ours, folder=tmp_path, NPROC="3", NNODES="2", HEAD="n0:1")
    assert several[2:8] == ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n0:1"]
    assert launch("deepspeed.sh", *ours, folder=tmp_path, HOSTFILE="h") == [
        "--hostfile", "h", "--module", "grads_dist", *ours
    ]  # fmt: skip
    assert launch("mpirun.sh", "--hosts", "a", "--", *ours, folder=tmp_path, NPROC="2") == [
        "-n", "2", "--hosts", "a", "python", "-m", "grads_dist", *ours
    ]  # fmt: skip
    assert launch("mpirun.sh", *ours, folder=tmp_path, NPROC="2")[2:] == ["python", "-m", "grads_dist", *ours]


def readme_commands() -> list[list[str]]:
    """The arguments of every command of the program in README.md."""
    text = (ROOT / "README.md").read_text()
    blocks = [block for block in text.split("```")[1::2] if block.startswith("\n")]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [found for found in re.findall(r"`(grads-dist [^`]*)`", text) if "--" in found]
    variables = dict(line.split("=", 1) for line in lines if re.match(r"\w+=\"", line))
    commands = []
    for part in (part for line in lines for part in line.split("&&")):
        for name, value in variables.items():
            part = part.replace(f"${name}", value.strip('"'))
        words = shlex.split(part, comments=True) if re.match(r"\s*(torchrun|grads-dist) ", part) else []
        program = [i for i, word in enumerate(words) if word in ("grads-dist", "grads_dist")]
        commands += [words[program[0] + 1 :]] if program else []
    return commands


def test_commands_of_the_readme_fit_its_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name in ("c.yaml", "run/config.yaml", "runs/demo/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    commands = readme_commands()
    assert {command[0] for command in commands} == {
        "run", "probe", "select", "merge", "inspect", "estimate", "status"
    }  # fmt: skip
    for command in commands:
        # A shell would put the folders there.
        words = [word for word in command if word != "shares/*"]
        prepare([*words, "shares/1", "shares/2"] if words != command else words)
