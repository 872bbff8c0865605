"""Nothing is executed from data, and nothing is fetched that was not asked for."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from processes import ROOT

from foundation.errors import CheckpointError
from foundation.interchange import registration

PACKAGES = ("foundation", "shards", "kernels", "launch")
PRODUCT = [ROOT / "setup.py", *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))]
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "code"}
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "torch.jit.load"}
RUNS |= {"subprocess.getstatusoutput", "torch.hub.load", "pd.read_pickle", "yaml.load", "yaml.load_all"}
RUNS |= {"yaml.unsafe_load", "yaml.full_load"}
NEEDED = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False", "numpy.load": "allow_pickle=False"}
LOADERS = ("Loader", "FullLoader", "UnsafeLoader", "CLoader")
ALLOWED = {"shell=False", "allow_pickle=False", "weights_only=True", "trust_remote_code=False"}
FORBIDDEN = {each.partition("=")[0] for each in ALLOWED}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def faults(tree: ast.AST) -> Iterator[str]:
    """What in this code could run something that data say."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {each.name}" for each in node.names if each.name.partition(".")[0] in UNSAFE)
        elif isinstance(node, ast.ImportFrom):
            wanted = [each.name for each in node.names if each.name != "UnpicklingError"]
            yield from (f"from {node.module} import {name}" for name in wanted if node.module in UNSAFE)
        elif isinstance(node, ast.Attribute):
            if node.attr in LOADERS and ast.unparse(node).startswith("yaml."):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from _of_a_call(node)


def _of_a_call(node: ast.Call) -> Iterator[str]:
    name, words = ast.unparse(node.func), [ast.unparse(each) for each in node.keywords]
    if name in RUNS:
        yield name
    if name in NEEDED and NEEDED[name] not in words:
        yield f"{name} without {NEEDED[name]}"
    for word in words:
        if word.partition("=")[0] in FORBIDDEN and word not in ALLOWED:
            yield f"{name}({word})"


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {name}" for name in sorted(UNSAFE)),
        *("from pickle import loads", "eval(x)", "exec(x)", "compile(x, '', 'exec')", "os.system(x)", "os.popen(x)"),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x)", "np.load(x, allow_pickle=True)"),
        *("yaml.load(x)", "yaml.load(x, yaml.SafeLoader)", "class A(yaml.Loader): pass", "yaml.unsafe_load(x)"),
        *("subprocess.run(x, shell=True)", "torch.jit.load(x)", "pd.read_pickle(x)", "f(trust_remote_code=yes)"),
    ],
)
def test_code_that_runs_what_data_say_is_found(source: str) -> None:
    assert list(faults(ast.parse(source)))


def test_the_product_runs_nothing_that_data_say() -> None:
    assert {str(file): found for file in PRODUCT if (found := list(faults(parsed(file))))} == {}


def test_asserts_of_the_product_only_tell_a_type() -> None:
    """`python -O` takes them out."""
    for file in PRODUCT:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Assert):
                text = ast.unparse(node.test)
                assert text.startswith("isinstance(") or text.endswith(" is not None"), f"{file}: assert {text}"


@pytest.mark.parametrize("flavor", ["mlflow.pyfunc.model", f"{registration.LOADER}, code: code"])
def test_a_model_of_a_registry_that_brings_code_is_not_loaded(tmp_path: Path, flavor: str) -> None:
    (tmp_path / "MLmodel").write_text(f"flavors: {{python_function: {{loader_module: {flavor}}}}}")
    with pytest.raises(CheckpointError, match="brings code of its own"):
        registration._ours(tmp_path)
    (tmp_path / "MLmodel").write_text(
        f"flavors: {{python_function: {{loader_module: {registration.LOADER}, code: null}}}}"
    )
    assert registration._ours(tmp_path) == str(tmp_path)


LISTENER = """
import json, os, sys
asked = []
QUIET = {"socket.bind", "socket.__new__", "socket.gethostname"}

def hook(event, arguments):
    if event.startswith("socket.") and event not in QUIET:
        asked.append(f"{event} {arguments[1:] if event == 'socket.connect' else arguments}")

sys.addaudithook(hook)
from foundation import cli

for words in json.loads(sys.argv[1]):
    sys.argv = ["foundation", *words]
    try:
        cli.main()
    except SystemExit as stop:
        asked += [f"{words[0]} failed"] if stop.code else []
asked.append("mlflow was there" if "mlflow" in sys.modules else "no mlflow")
asked.append("timm was there" if "timm" in sys.modules else "no timm")
with open(os.environ["ASKED"], "w") as file:
    json.dump(asked, file)
"""


@pytest.mark.slow
def test_a_run_its_evaluation_report_and_export_open_no_connection(tmp_path: Path, tiny_yaml: Path) -> None:
    """With MLflow's file beside the run. In a process of its own: imports count too."""
    run = tmp_path / "runs" / "tiny"
    catalog = next(line for line in tiny_yaml.read_text().splitlines() if "catalog: " in line)
    data = catalog.partition("catalog: ")[2].partition(",")[0]
    commands = [
        ["train", tiny_yaml, "train.samples=16", "tracking.mlflow=true"],
        ["evaluate", run, "--data", data, "--protocol", "knn", "--crop", "0"],
        ["export", run, tmp_path / "timm", "--format", "timm"],
        ["export", run, tmp_path / "torch", "--format", "torch", "--register", "tiny"],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-c", LISTENER, json.dumps(commands, default=str)],
        env={**environment, "PYTHONPATH": str(ROOT), "ASKED": str(tmp_path / "asked.json")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "asked.json").read_text()) == ["mlflow was there", "timm was there"], done.stderr
    assert (tmp_path / "runs" / "mlflow.db").exists()
    assert (run / "report.html").exists()
