"""What trains without PyTorch's compiler, and that nothing misses what it has not imported.

Every case is a process of its own: what is imported stays. Each is a fork of one that has
imported what the case begins with, and what the compiler itself imports: half of its time.
"""

from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from textwrap import dedent

import pytest

from tests.forks import Prepared, prepared

WARM = """
    import sys
    from clients.executor import LIBRARIES
    from importlib import import_module
    from fleet.without_compiler import compiler_aside

    with compiler_aside():
        for name in LIBRARIES:
            import_module(name)
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

BROUGHT = """
    import sympy, torch.distributed.fsdp, torch.fx.experimental.symbolic_shapes
    assert "torch._dynamo.convert_frame" not in sys.modules
"""


@pytest.fixture(scope="module")
def torch_alone() -> Iterator[Prepared]:
    alone = "assert 'torch._dynamo' not in sys.modules"
    with prepared("import sys, torch", BROUGHT, alone) as process:
        yield process


@pytest.fixture(scope="module")
def device() -> Iterator[Prepared]:
    """All that a device imports, as it does."""
    with prepared(WARM) as process:
        yield process


@pytest.fixture(scope="module")
def torch_aside() -> Iterator[Prepared]:
    """Like a device that has imported PyTorch, the first of its libraries."""
    with prepared(
        "import sys",
        "from fleet.without_compiler import compiler_aside",
        "aside = compiler_aside()",
        "aside.__enter__()",
        "import torch",
        BROUGHT,
        "assert isinstance(torch._dynamo, type(sys)) and 'torch._dynamo' in sys.modules",
    ) as process:
        yield process


def test_a_device_trains_without_the_compiler_and_what_it_brings(device):
    heavy = '[m for m in ("torch._dynamo", "triton", "sympy") if m in sys.modules]'
    assert device.run(TRAIN, f"print({heavy})") == "[]"


@pytest.mark.slow  # the device above builds one
def test_a_backbone_is_built_without_it(torch_alone):
    build = """
        from fleet.backbones import load_backbone
        load_backbone("mobilenet_v3_small", num_classes=3, image_size=32, weights="none")
    """
    assert torch_alone.run(build, "print('torch._dynamo' in sys.modules)") == "False"


def test_whoever_needs_the_compiler_later_gets_it(device):
    compiled = "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    named = "print(torch._dynamo.__name__, callable(torch._dynamo.optimize))"
    assert device.run("import torch", compiled, named) == "2.0\ntorch._dynamo True"


def test_what_asks_for_the_compilers_help_as_it_runs_gets_the_same_answer(device):
    align = """
        import torch
        from torchvision.ops import roi_align

        boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
        print(roi_align(torch.arange(64.0).reshape(1, 1, 8, 8), boxes, (2, 2)).tolist())
    """
    assert device.run(align) == printed(align) != ""


def printed(code):
    """What this process prints, which has the compiler itself."""
    import torch._dynamo

    assert hasattr(torch._dynamo, "optimize")
    with redirect_stdout(StringIO()) as said:
        exec(dedent(code), {})
    return said.getvalue().strip()


@pytest.mark.parametrize(
    "needs",
    [
        "import torch._dynamo.config",
        "from torch._dynamo import eval_frame",
        "import torch\ntorch._dynamo.optimize",
        # As the first two do; and as a device does, above.
        pytest.param("from torch._dynamo.decorators import disable", marks=pytest.mark.slow),
        pytest.param(
            "import torch\ntorch.compile(lambda x: x + 1, backend='eager')(torch.ones(1))",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_who_needs_more_of_the_compiler_gets_it_and_once(needs, torch_aside):
    found = torch_aside.run(
        needs,
        "assert hasattr(sys.modules['torch._dynamo'], 'convert_frame')",
        "aside.__exit__(None, None, None)",
        "import torch, torch._dynamo.config as part",
        "print(part is sys.modules['torch._dynamo'].config, part.__spec__.name)",
        "print(torch._dynamo.eval_frame is sys.modules['torch._dynamo.eval_frame'])",
    )
    assert found.split() == ["True", "torch._dynamo.config", "True"]


def test_an_optimizer_of_pytorchs_steps_the_same(torch_alone):
    steps = """
        import torch

        def train():
            torch.manual_seed(0)
            net = torch.nn.Linear(3, 2)
            sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                sgd.zero_grad()
                net(torch.ones(4, 3)).square().sum().backward()
                sgd.step()
            print(net.weight.tolist())
    """
    aside = """
        import sys
        from fleet.without_compiler import compiler_aside

        with compiler_aside():
            train()
        assert "torch._dynamo" not in sys.modules
    """
    assert torch_alone.run(steps, aside) == printed(dedent(steps) + "train()") != ""


def test_what_is_never_compiled_is_not_afterwards_either(torch_alone):
    once = """
        import torch
        from fleet.without_compiler import compiler_aside

        net = torch.nn.Linear(3, 2)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        with compiler_aside():
            sgd.zero_grad()
        graphs = []
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        @torch.compile(backend=backend)
        def step(x):
            sgd.zero_grad()
            return net(x).sum()

        step(torch.ones(4, 3)).backward()
        print(len(graphs))
    """
    plain = once.replace("with compiler_aside():", "if True:")
    assert torch_alone.run(once) == torch_alone.run(plain) != ""


def test_nothing_stands_in_for_a_compiler_that_is_there(torch_alone):
    torch_alone.run(
        "import sys, torch._dynamo as before",
        "from fleet.without_compiler import compiler_aside",
        "with compiler_aside(): assert sys.modules['torch._dynamo'] is before",
    )
