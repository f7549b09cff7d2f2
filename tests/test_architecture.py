"""The walls of docs/architecture.md: who may import whom, and how long a file or a function may grow."""

import ast

import pytest

ROOMS = {  # room -> rooms it may import from
    "ops": set(),
    "layers": {"ops"},
    "data": set(),
    "models": {"layers", "ops", "data"},
    "targets": {"models", "layers", "data"},
    "train": {"models", "targets", "data", "layers"},
    "asr": {"models", "targets", "data", "layers"},
    "analysis": {"models", "targets", "data", "layers"},
    "efficiency": {"models", "data", "layers", "ops"},
    "recipe": {"data"},
}
KNOWS_ESPNET = {"train", "asr"}


def python_files(root, *folders):
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room, root):
    for path in python_files(root, f"espnet_mamba/{room}"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "espnet_mamba" and len(parts) > 2 and parts[1] != room:
                assert parts[1] in ROOMS[room], f"{path} imports {name}"
            if parts[0] in ("espnet", "espnet2"):
                assert room in KNOWS_ESPNET, f"{path} imports {name}"
            assert parts[0] not in ("s3prl", "s3prl_upstream") or room == "asr" and parts[0] == "s3prl_upstream", path


def test_files_and_functions_stay_small(root):
    for path in python_files(root, "espnet_mamba", "s3prl_upstream", "tests", "benchmarks"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                # a GPU kernel is one function with a line per pointer and stride; its body may fill two screens
                is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                first, limit = (node.body[0].lineno, 140) if is_kernel else (node.lineno, 70)
                assert node.end_lineno - first < limit, f"{path}:{node.lineno} {node.name}"


def test_every_command_has_help_without_heavy_imports(root):
    for path in python_files(root, "espnet_mamba/bin"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", None) or node.names[0].name for node in top}
        heavy = {"torch", "numpy", "scipy", "espnet2", "s3prl", "s3prl_upstream", "matplotlib"}
        assert not {name.split(".")[0] for name in names} & heavy, path
