"""What a warm ClientApp has imported, and that nothing misses what it has not.

Every case is a process of its own: what is imported stays.
"""

import subprocess
import sys
from textwrap import dedent

import pytest


def run(*code: str) -> str:
    """What a fresh Python prints."""
    lines = "\n".join(dedent(part) for part in code)
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WARM = """
    import sys
    from clients.executor import LIBRARIES
    from clients.libraries import import_without_compiler

    for name in LIBRARIES:
        import_without_compiler(name)
"""
# Two steps of a model with a frozen tail, and of one with squeeze-excite, planned as on a device.
TRAIN = """
    import torch
    from fleet.backbones import load_backbone
    from fleet.measure import dry_run
    from fleet.mobiletl import TransferModel
    from fleet.optim import SGD
    from fleet.plan import make_plan
    from fleet.train import take_step

    for name in ("efficientnet_lite0", "mobilenet_v3_small"):
        weights = "default" if name == "efficientnet_lite0" else "none"
        backbone = load_backbone(name, num_classes=3, image_size=32, weights=weights)
        plan = make_plan(backbone, method="mobiletl", blocks=2)
        dry_run(backbone, plan, "recompute", batch_size=4)
        model = TransferModel(backbone, plan)
        sgd = SGD(model.trainable_parameters(), 0.01, 0.9, 0.0, torch.float32)
        for _ in range(2):
            take_step(model, sgd, model.features(torch.randn(4, 3, 32, 32)), torch.arange(4) % 3)
"""


def test_a_device_trains_without_the_compiler_and_what_it_brings():
    heavy = '[m for m in ("torch._dynamo", "triton", "sympy") if m in sys.modules]'
    assert run(WARM, TRAIN, f"print({heavy})") == "[]"


def test_whoever_needs_the_compiler_later_gets_it():
    compiled = "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    named = "print(torch._dynamo.__name__, callable(torch._dynamo.optimize))"
    assert run(WARM, "import torch", compiled, named) == "2.0\ntorch._dynamo True"


def test_what_asks_for_the_compilers_help_as_it_runs_gets_the_same_answer():
    align = """
        import torch
        from torchvision.ops import roi_align

        boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
        print(roi_align(torch.arange(64.0).reshape(1, 1, 8, 8), boxes, (2, 2)).tolist())
    """
    assert run(WARM, align) == run(align)


@pytest.mark.parametrize(
    "needs", ["import torch._dynamo.config", "import torch\ntorch._dynamo.optimize"]
)
def test_a_module_that_needs_more_of_the_compiler_as_it_is_imported_gets_it(tmp_path, needs):
    (tmp_path / "needy.py").write_text(needs)
    found = run(
        f"import sys\nsys.path.append({str(tmp_path)!r})",
        "from clients.libraries import import_without_compiler",
        "import_without_compiler('needy')",
        "print(hasattr(sys.modules['torch._dynamo'], 'convert_frame'))",
    )
    assert found == "True"


def test_a_library_that_is_not_there_is_told_by_name():
    with pytest.raises(AssertionError, match="No module named 'no_such_library'"):
        run(
            "from clients.libraries import import_without_compiler",
            "import_without_compiler('no_such_library')",
        )
