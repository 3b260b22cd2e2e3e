"""The engine changes how fast a network runs and nothing else; costs are counted."""

import copy
import ctypes
import json
import platform

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robustood import engine
from robustood.data import Batch, Data, Split, digits
from robustood.detectors import MSP
from robustood.engine import Engine, Meter, Running, arithmetic, choose, flops, running
from robustood.evaluate import ood_report
from robustood.models import frozen, small_cnn
from robustood.objectives import ALOE, Standard
from robustood.perturbations import Linf
from robustood.training import fit


@pytest.fixture(scope="module")
def photos():
    """Colour images whose class is their main colour, and grey outliers."""
    made = torch.Generator().manual_seed(3)
    y = torch.arange(192) % 3
    x = 0.3 * torch.rand(192, 3, 16, 16, generator=made)
    x[torch.arange(192), y] += 0.5
    outliers = torch.rand(192, 1, 16, 16, generator=made).expand(-1, 3, -1, -1).contiguous()
    split = Split(x, y)
    return Data(split, split[:48], split[:48], outliers)


def network(reject=0, batch_norm=False):
    return small_cnn(3, reject, channels=3, size=16, batch_norm=batch_norm)


def batch(photos, n=16):
    noise = torch.Generator().manual_seed(0)
    return Batch(photos.train.x[:n], photos.train.y[:n], photos.outliers[:n], noise)


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# ---- the wrapper


def test_the_plain_engine_is_the_model_itself():
    model = network()
    assert Engine().run(model) is model


def test_a_running_model_shows_the_network_and_computes_the_same(photos):
    model = network(reject=1, batch_norm=True).eval()
    expected = model(photos.test.x)
    running = Engine(channels_last=True).run(model)
    assert isinstance(running, Running) and (running.classes, running.reject) == (3, 1)
    assert torch.allclose(running(photos.test.x), expected, atol=1e-5)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = running.nonsense


def test_bf16_rounds_the_network_but_neither_inputs_nor_outputs_nor_weights(photos):
    model = network().eval()
    seen = []
    model.body[1].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    running = Engine("bf16").run(model)
    x = photos.test.x.clone().requires_grad_()
    z = running(x)
    assert seen == [torch.bfloat16] and z.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    (grad,) = torch.autograd.grad(z.sum(), x)
    assert grad.dtype == torch.float32
    exact = model(photos.test.x)
    error = (z - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 0.03  # bf16 has 8 bits


def test_a_compiled_attack_is_one_graph_and_bitwise_the_plain_one(run_script):
    """fullgraph=True raises where tracing would break; the backend runs the traced graph as it stands."""
    printed = run_script(
        """
        import torch
        from robustood import attacks, losses
        from robustood.engine import Engine
        from robustood.models import frozen, small_cnn
        from robustood.objectives import ATOM
        from robustood.perturbations import L2, Linf

        torch.manual_seed(0)
        x, y = torch.rand(24, 3, 16, 16), torch.arange(24) % 3
        model = small_cnn(3, channels=3, size=16, batch_norm=True)
        running = Engine(compile="eager").run(model)
        plain, careful = (Linf(8 / 255), "last", attacks.Ascent()), (L2(0.3), "best", attacks.APGD())
        for within, keep, rule in (plain, careful):
            found = []
            for net, climb in ((model, None), (running, running.climb)):
                with frozen(net):
                    def objective(v): return losses.cross_entropy(net(v), y)
                    how = dict(steps=3, keep=keep, rule=rule, climb=climb)
                    found.append(attacks.search(objective, x, within, **how))
            print(torch.equal(*found), bool((found[0] != x).any()))
        """,
    )
    assert printed.split() == ["True"] * 4


@pytest.mark.slow
def test_bf16_and_float32_train_equally_robust_detectors():
    """The digits recipe of the chapter on objectives, shortened; minutes on a chip without bf16."""
    book, found = digits(), {}
    for precision in ("float32", "bf16"):
        model = small_cnn(width=2)
        fit(model, ALOE(0.1), book, epochs=25, engine=Engine(precision))
        how = {"side": "both", "steps": 20, "targets": 2}
        report = ood_report(MSP(model), book.test.x, book.ood, Linf(0.1), **how)
        found[precision] = report.mean("auroc")
    assert found["float32"] > 0.95
    assert abs(found["bf16"] - found["float32"]) < 0.01, found


@pytest.mark.slow
def test_compiled_training_is_training_and_compiles_once(run_script):
    """Update and attack through the compiler, against eager; no step but the first makes a graph.

    A set that grows, or batch statistics that move, would need a graph a step: those attacks stay eager.
    """
    printed = run_script(
        """
        import torch
        from torch._dynamo.utils import counters
        from robustood.data import digits
        from robustood.engine import Engine
        from robustood.models import small_cnn
        from robustood.objectives import ALOE, ATOM, Adversarial
        from robustood.training import fit

        rules = ALOE(0.1), ATOM(0.1), Adversarial(0.1, ramp=0.5), ALOE(0.1, bn="train")
        for rule in rules:
            weights = []
            for how in (None, Engine(compile="aot_eager")):
                torch._dynamo.reset()
                counters.clear()
                model = small_cnn(10, 1)
                fit(model, rule, digits(train=320), epochs=2, engine=how)
                weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
            print(float((weights[0] - weights[1]).abs().max()), counters["stats"]["unique_graphs"])
        """,
    )
    for line in printed.splitlines():
        gap, graphs = line.split()
        assert float(gap) < 2e-3 and int(graphs) <= 3, printed


def test_a_run_whose_compilation_fails_says_so_once_and_goes_on(run_script):
    """The backend raises, or the attack cannot be one graph; weights are those of the uncompiled run."""
    printed = run_script(
        """
        import json, warnings
        import torch
        from robustood.data import Data, Split
        from robustood.engine import Engine
        from robustood.models import Classifier, mlp
        from robustood.objectives import ALOE
        from robustood.training import fit

        def broken(graph, inputs):
            raise RuntimeError("no such compiler")

        class Reading(Classifier):
            def forward(self, x):
                return super().forward(x) * float(x.shape[0] * x.detach().sum().isfinite().item())

        torch._dynamo.register_backend(broken, name="broken")
        y = torch.arange(48) % 3
        x = torch.rand(48, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        data = Data(Split(x, y), Split(x, y), Split(x, y), 1 - x)
        for kind, backend in ((Classifier, "broken"), (Reading, "eager")):
            weights = []
            for how in (None, Engine(compile=backend)):
                model = mlp(16, (8,), 3)
                model.__class__ = kind
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    run = fit(model, ALOE(0.1), data, epochs=2, batch_size=16, engine=how)
                weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
            failures = [str(w.message) for w in said if "goes on uncompiled" in str(w.message)]
            same = torch.equal(*weights)
            print(json.dumps([same, failures, run.speed["compile"], run.speed["compile_failed"]]))
        """,
    )
    broken, unsupported = [json.loads(line) for line in printed.splitlines()]
    for same, failures, compiled, reason in (broken, unsupported):
        assert same and len(failures) == 1 and compiled is False and reason in failures[0]
    assert "no such compiler" in broken[3]


def test_training_in_another_layout_is_the_same_training(photos):
    plain, other = network(), network()
    for model, how in ((plain, None), (other, Engine(channels_last=True))):
        fit(model, Standard(), photos, epochs=3, batch_size=32, engine=how)
    assert torch.allclose(vector(plain), vector(other), atol=1e-4)


# ---- the choice


def test_the_faster_engine_is_chosen_and_a_given_one_is_not_measured(monkeypatch):
    model = network()
    rates = {}

    def pretend(call, device, least=0.5):
        trial, _ = call.args
        return 1 / rates[trial.engine.precision, trial.engine.channels_last]

    monkeypatch.setattr(engine, "median_seconds", pretend)
    kinds = [("float32", False), ("float32", True), ("bf16", False), ("bf16", True)]
    for speeds, wins in (
        ((1, 2, 1, 1), kinds[1]),
        ((1, 1.5, 1.6, 1.7), kinds[1]),  # bf16 must gain a fifth
        ((1, 1.5, 9, 6), kinds[2]),
    ):
        rates.update(zip(kinds, speeds))
        found = choose(model, (3, 16, 16))
        assert (found.precision, found.channels_last) == wins and not found.compile
        assert len(found.measured) == 4
    rates.clear()  # nothing may be looked up
    assert choose(model, (3, 16, 16), precision="bf16", channels_last=False) == Engine("bf16")


def test_a_choice_by_measurement_leaves_the_model_alone():
    model = network(batch_norm=True)
    before = copy.deepcopy(model.state_dict())
    found = choose(model, (3, 16, 16), batch_size=8)
    assert set(found.measured) == {
        "float32",
        "float32, channels_last",
        "bf16",
        "bf16, channels_last",
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_gpu_gets_what_its_chip_has(monkeypatch):
    for capability, precision in (((7, 5), "float32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found = choose(network(), (3, 16, 16), "cuda")
        assert found == Engine(precision, channels_last=True, compile=True, benchmark=True)
        exact = choose(network(), (3, 16, 16), "cuda:1", precision="float32", compile=False)
        assert exact == Engine(channels_last=True, tf32=capability >= (8, 0), benchmark=True)


def test_a_device_that_nobody_measured_gets_the_plain_engine():
    assert choose(network(), (3, 16, 16), "mps") == Engine()
    assert choose(network(), (3, 16, 16), "mps", precision="bf16") == Engine("bf16")


def test_the_arithmetic_of_training_ends_with_it(monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = lambda: (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)
    before, model = flags(), network()
    # Without a GPU the flags are there all the same.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def interrupted():
        with running(model, Engine(tf32=True, benchmark=True)):
            assert flags() == (True, True, True)
            with arithmetic():  # an evaluation
                assert flags() == (False, False, False)
            assert flags() == (True, True, True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert flags() == before
    with running(model, Engine()):
        assert flags() == (False, False, False)
    assert flags() == before


def test_an_unknown_format_is_refused(untyped):
    for make in (lambda: Engine("fp8"), lambda: choose(network(), (3, 16, 16), precision="half")):
        with pytest.raises(ValueError, match="precision must be"):
            make()


# ---- the floor


def test_measuring_a_step_leaves_no_trace_in_layers_that_draw(photos):
    weights = []
    for how in (None, Engine(), Engine()):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.Dropout(0.3), nn.Linear(16, 3))
        fit(model, Standard(), photos, epochs=2, engine=how)
        weights.append(vector(model))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])


def test_a_network_whose_first_layer_rests_is_still_updated_by_the_engine(photos):
    model = network()
    model.body[0][0].weight.requires_grad_(False)
    running = Engine(channels_last=True).run(model)
    running.calls["update"] = lambda x: pytest.fail("an attack went through the update")
    with frozen(running):
        running(photos.test.x)
    seen = []
    running.calls["update"] = lambda x: seen.append(len(x)) or model(x)
    running(photos.test.x)
    assert seen == [48]


def test_a_measured_choice_goes_on_with_the_run_that_another_measurement_began(photos, tmp_path):
    for rate in (100.0, 101.0):
        how = Engine(channels_last=True, measured={"float32": rate})
        fit(network(), Standard(), photos, epochs=1, engine=how, run_dir=tmp_path)


def test_operations_of_a_layer_by_hand():
    layer = nn.Conv2d(3, 5, 3, padding=1)
    assert flops(lambda: layer(torch.ones(2, 3, 8, 8))) == 2 * 2 * 5 * 8 * 8 * 27
    head = nn.Linear(7, 4)
    x = torch.ones(6, 7)
    forward = 2 * 6 * 7 * 4
    # No gradient reaches the input of a first layer: one of the two products of a backward is left out.
    assert flops(lambda: cross_entropy(head(x), torch.zeros(6).long()).backward()) == 2 * forward


def test_the_meter_counts_the_attack_and_puts_everything_back(photos):
    model = network(batch_norm=True)
    before = copy.deepcopy(model.state_dict())
    one = batch(photos, 8)
    x = torch.cat([one.x, one.outliers])
    meters = [Meter.read(model, model, ALOE(2 / 255, steps=k), one) for k in (1, 2, 4)]
    # Each step of the attack costs the same: one forward and one backward to the input.
    assert meters[2].flops - meters[1].flops == 2 * (meters[1].flops - meters[0].flops)
    forward = flops(lambda: model.eval()(x))
    assert meters[1].flops - meters[0].flops == pytest.approx(2 * forward, rel=0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and meters[0].bare > 1e6


def test_a_report_says_how_far_from_the_floor():
    meter = Meter(flops=2_000_000, bare=1e6)  # the floor of a step is two seconds
    found = meter.report(Engine(channels_last=True), 3.0, 6, torch.device("cpu"))
    assert found["over_floor"] == pytest.approx(1.5)
    assert found["images_per_second"] == pytest.approx(2) and found["floor_images_per_second"] == 3
    assert "share_of_peak" not in found and found["channels_last"] is True
    assert json.loads(json.dumps(found)) == found


def test_a_run_with_an_engine_reports_its_speed_and_another_does_not(photos):
    model, plain = network(), network()
    run = fit(model, ALOE(2 / 255), photos, epochs=2, batch_size=32, outlier_batch_size=32,
              engine=Engine(channels_last=True))  # fmt: skip
    assert run.speed["over_floor"] > 0.5 and run.speed["flops_per_step"] > 0
    assert (
        fit(plain, ALOE(2 / 255), photos, epochs=2, batch_size=32, outlier_batch_size=32).speed
        == {}
    )
    assert torch.allclose(vector(model), vector(plain), atol=1e-4)  # the measurement left no trace


MAPPED = """
import ctypes, sys
import torch
from robustood.engine import keep_memory

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
Info = type("Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in names.split()]})
state = ctypes.CDLL(None).mallinfo2
state.restype = Info
if sys.argv[1] == "kept":
    keep_memory()
before = state().hblkhd  # bytes that are mapped apart, and go back to the system when they are freed
block = torch.ones(12_000_000)
print(state().hblkhd - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only glibc returns memory this way, and tells of it from 2.33 on",
)
def test_memory_of_large_tensors_is_kept(run_script):
    apart, kept = (int(run_script(MAPPED, how)) for how in ("as it is", "kept"))
    assert apart >= 48_000_000 and kept == 0
