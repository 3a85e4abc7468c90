"""Healing of pruned models: the training of `sana15 prune --heal`, and the distillation beside it."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import sana15
from sana15.cli import main, parser
from sana15.model import checkpoint as transformer_checkpoint
from sana15.model.autoencoder import Autoencoder
from sana15.model.checkpoint import load_transformer, save_transformer
from sana15.model.folder import MINI
from sana15.model.text import MiniTextEncoder
from sana15.pruning import folder as pruning_files
from sana15.pruning import healing as healing_module
from sana15.pruning import report as importance_report
from sana15.pruning import search as pruning_search
from sana15.pruning.choice import Choice
from sana15.pruning.folder import prune_folder
from sana15.pruning.healing import Healing, dtype_name
from sana15.pruning.importance import batch_loss
from sana15.pruning.trajectory import calibration_prompts
from sana15.sampling import flow as flow_of
from sana15.sampling.pipeline import Pipeline
from sana15.storage.files import DataError
from sana15.storage.weights import WEIGHTS, folder_weights
from sana15.training import run as training
from sana15.training import tasks as train_tasks
from sana15.training.config import load_config
from sana15.training.data import SceneBatches
from sana15.training.distillation import Distillation, counterparts
from sana15.training.tasks import TransformerTask

KEPT = [0, 1, 3, 4, 6, 8, 9, 11]
QUICK = Healing(steps=2, batch_size=2)


def weights(folder):
    return load_transformer(folder / "transformer").state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def others(folder):
    """Every file but the transformer's and the settings."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "sana15.json" and "transformer" not in path.parts
    }


def test_trains_the_transformer_and_nothing_else(tmp_path):
    plain, healed, again, other = (tmp_path / name for name in ("plain", "healed", "again", "other"))
    prune_folder("mini", plain, by="indices", indices=KEPT)
    for folder, heal in ((healed, QUICK), (again, QUICK), (other, Healing(steps=2, batch_size=2, seed=1))):
        prune_folder("mini", folder, by="indices", indices=KEPT, heal=heal)
    assert not same(weights(plain), weights(healed))
    assert same(weights(healed), weights(again))
    assert not same(weights(healed), weights(other))
    assert others(healed) == others(plain)
    settings = json.loads((healed / "sana15.json").read_text())
    assert settings["pruning"]["kept"] == KEPT
    assert Healing(**settings["pruning"]["healing"]) == replace(QUICK.for_kept(KEPT, 12), data="scenes")
    assert settings["guidance"] == json.loads((MINI / "sana15.json").read_text())["guidance"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "healed", "other", "plain"]
    Pipeline.from_pretrained(healed)("a red circle", steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_weights_stays(tmp_path, dtype):
    shutil.copytree(MINI, tmp_path / "src", ignore=shutil.ignore_patterns("transformer"))
    save_transformer(load_transformer(MINI / "transformer"), tmp_path / "src" / "transformer", dtype=dtype)
    prune_folder(tmp_path / "src", tmp_path / "out", indices=KEPT, heal=QUICK)
    assert {w.dtype for w in folder_weights(tmp_path / "out" / "transformer").values()} == {dtype}


@pytest.mark.parametrize("order", [1, -1])
def test_two_sixteen_bit_dtypes_need_fp32_whichever_comes_first(tmp_path, order):
    pair = [torch.bfloat16, torch.float16][::order]
    tensors = {name: torch.zeros(2, dtype=dtype) for name, dtype in zip("ab", pair)}
    save_file(tensors, tmp_path / WEIGHTS)
    assert dtype_name(tmp_path) == "fp32"


def test_a_model_that_is_not_finite_is_one_line(tmp_path, capsys):
    shutil.copytree(MINI, tmp_path / "src", ignore=shutil.ignore_patterns("transformer"))
    model = load_transformer(MINI / "transformer")
    model.proj_out.weight.data[0, 0] = torch.nan
    save_transformer(model, tmp_path / "src" / "transformer")
    arguments = ["prune", str(tmp_path / "src"), str(tmp_path / "out"), "--indices", "0,1", "--heal", "1"]
    assert main(arguments) == 3
    assert "the loss is nan at step 1" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(("distill", "flow"), [(10.0, 0.0), (0.0, 1.0)])
def test_what_healing_asks_of_training(tmp_path, monkeypatch, distill, flow):
    seen = []
    original = train_tasks.TransformerTask

    def watched(config, *others, distillation):
        seen.append((config, distillation))
        return original(config, *others, distillation=distillation)

    monkeypatch.setattr(train_tasks, "TransformerTask", watched)
    prune_folder("mini", tmp_path / "out", indices=KEPT, heal=Healing(steps=1, batch_size=2, noises=3, distill=distill))
    ((config, distillation),) = seen
    c = config.transformer
    assert (c.distill, c.flow_weight, distillation is not None) == (distill, flow, distill > 0)
    assert (c.noises, c.stratified, c.caption_drop, config.precision) == (3, True, 0.25, "bf16")
    assert (config.optimizer, config.schedule, config.decay_part) == ("soap", "decay", 0.3)
    assert (config.warmup, config.ema) == (1, 0.9)
    assert config.lr == Healing(distill=distill).for_kept(KEPT, 12).lr
    assert c.flow_shift == Pipeline.from_pretrained("mini").flow_shift


@pytest.mark.parametrize("flow", [0.0, 2.0])
def test_the_loss_of_several_noise_levels_a_picture(tmp_path, flow):
    """Every picture at each of them, with its own prompt; the flow loss and the distance, each with its weight."""
    prune_folder("mini", tmp_path / "small", indices=KEPT)
    options = [f"transformer.{k}={v}" for k, v in {
        "autoencoder": MINI / "vae", "start": tmp_path / "small", "teacher": MINI, "distill": 3, "flow_weight": flow,
        "noises": 2, "caption_drop": 0, "stratified": True}.items()]  # fmt: skip
    task = TransformerTask.of_config(load_config(None, options), "cpu")
    seen = []
    task.module["transformer"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    batch = SceneBatches(0, 3, 1)[0]
    found = task.loss(batch, torch.Generator().manual_seed(1))
    ((x, text, timestep, _),) = seen
    assert x.shape[0] == 6
    assert torch.equal(text[:3], text[3:])
    assert len(set(timestep.tolist())) == 6
    generator = torch.Generator().manual_seed(1)
    torch.rand(6, generator=generator)
    x0 = task.autoencoder.encode(batch.pictures).repeat(2, 1, 1, 1)
    noise = torch.randn(x0.shape, generator=generator)
    assert torch.equal(timestep, (flow_of.sample_sigmas(6, generator, flow_shift=3.0, stratified=True) * 1000).floor())
    plain = (task.distillation.velocity - (noise - x0)).square().mean()
    assert found.item() == pytest.approx((flow * plain + 3 * task.distillation.loss()).item(), rel=1e-4)


def test_documented_defaults():
    args = parser().parse_args(["prune", "mini", "out", "--heal"])
    assert (args.heal, args.count, args.steps, args.seed) == (100, 100, 20, 0)
    assert (args.heal_on, args.heal_batch, args.heal_lr) == (None, None, None)
    assert Healing() == Healing(steps=100, lr=None, batch_size=None, noises=4, distill=10.0, seed=0, data=None)
    mini, other = Pipeline.from_pretrained("mini").text, object()
    assert Healing().of_model(mini) == Healing(batch_size=64, data="scenes")
    assert Healing(data="samples").of_model(mini) == Healing(batch_size=64, data="samples")
    assert Healing().of_model(other) == Healing(batch_size=4, data="samples", lr=1e-4)
    given = Healing(batch_size=2, data="samples", lr=3e-5)
    assert given.of_model(other) == given.of_model(mini) == given
    with pytest.raises(ValueError, match="only a model with the mini text encoder can be healed on rendered scenes"):
        Healing(data="scenes").of_model(other)
    assert Healing(distill=0).for_kept([0, 1, 2, 3, 4, 6], 12).lr == Healing().for_kept([0, 1, 2, 3, 4, 6], 12).lr / 2
    assert Healing(distill=0).for_kept([3, 9], 12).lr == 1e-2
    assert Healing(lr=1e-4).for_kept([0, 1, 2, 3, 4, 6], 12).lr == 1e-4


@pytest.mark.parametrize(
    ("kept", "distance"),
    [
        (range(12), 1),
        ([0, 2, 3, 5, 6, 8, 9, 11], (4 * 4 + 4 * 1) / 8),  # counterparts as they stand
        ([0, 1, 2, 3, 4, 5, 6, 7], (4 * 4 + 4 * 1 + 1 + 4 + 9) / 8),
        ([0, 1, 2, 3, 4, 6], (6 * 4 + 0 + 1 + 4 + 9 + 16 + 16) / 6),
        ([0, 1, 2, 3], 2e-2 / 1.6e-3),  # the limit
    ],
)
def test_the_rate_follows_the_distance(kept, distance):
    assert Healing().for_kept(list(kept), 12).lr == pytest.approx(1.6e-3 * distance)


def test_lowers_the_loss_and_distillation_the_distance(tmp_path):
    pipe = Pipeline.from_pretrained("mini")
    batches = list(sana15.calibration(pipe, ["a red circle", "two blue stars", "a ring left of a heart"], steps=4))

    def loss(folder):
        model = load_transformer(folder / "transformer")
        return sum(batch_loss(model, batch).double().mean().item() for batch in batches)

    def distance(folder):
        distillation = Distillation(model := load_transformer(folder / "transformer"), pipe.transformer, KEPT)
        total = 0.0
        for batch in batches:
            with torch.no_grad():
                model(batch.latents, batch.text, batch.timestep, batch.mask)
            total += distillation.loss().item()
        return total

    folders = [tmp_path / name for name in ("plain", "healed", "distilled")]
    for folder, heal in zip(folders, (None, Healing(20, batch_size=4, distill=0), Healing(20, batch_size=4))):
        prune_folder("mini", folder, by="indices", indices=KEPT, heal=heal)
    plain, healed, distilled = map(loss, folders)
    assert healed < plain
    assert distilled < plain
    assert distance(folders[2]) < 0.7 * distance(folders[1])


def test_distillation_of_the_source_itself_is_nothing():
    """All blocks kept: no distance. Without the last block: that block's own change, over the variance."""
    pipe = Pipeline.from_pretrained("mini")
    batch = next(iter(sana15.calibration(pipe, ["a red circle", "a green ring left of a blue heart"], steps=2)))
    assert not batch.mask.all()
    everything = list(range(12))
    for kept in (everything, everything[:-1]):
        student = sana15.prune(pipe.transformer, by="indices", indices=kept)
        teacher = load_transformer(MINI / "transformer")
        features: list[torch.Tensor] = []
        hook = teacher.transformer_blocks[11].register_forward_hook(lambda _, i, o, to=features: to.extend([i[0], o]))
        distillation = Distillation(student, teacher, kept)
        ours = student(batch.latents, batch.text, batch.timestep, text_mask=batch.mask)  # the teacher gets it too
        found = distillation.loss().item()
        hook.remove()
        if kept == everything:
            assert found == 0
            continue
        before, after = features[0], features[1]
        keep = (after - after.mean()).abs() <= 3 * after.std()
        last = (before - after).square()[keep].mean() / after[keep].var()
        velocity = (ours - batch.velocity).square().mean().item()
        assert found == pytest.approx(last.item() / 11 + 0.1 * velocity, rel=1e-4)


@pytest.mark.parametrize(
    ("kept", "layers", "wanted"),
    [
        (range(12), 12, range(12)),
        ([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11], 12, [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]),  # as they stand
        ([0, 2, 3, 5, 6, 8, 9, 11], 12, [1, 2, 4, 5, 7, 8, 10, 11]),
        ([0, 1, 2, 3, 4, 5, 6, 7], 12, [0, 1, 2, 3, 5, 7, 9, 11]),
        ([0, 1, 2, 3, 4, 6], 12, [1, 3, 5, 7, 9, 11]),
        ([5], 12, [11]),
        (range(0, 60, 3), 60, range(2, 60, 3)),
    ],
)
def test_counterparts_of_known_choices(kept, layers, wanted):
    assert counterparts(list(kept), layers) == list(wanted)


def test_counterparts_are_the_best_of_all():
    for layers, n in ((7, 3), (8, 3), (8, 5), (9, 4)):
        for kept in itertools.combinations(range(layers), n):

            def cost(ends, kept=kept):
                starts = (0, *ends[:-1])
                spans = sum((a - b) ** 2 for a, b in zip(ends, starts))
                return spans, sum((a - b) ** 2 for a, b in zip(starts, kept))

            found = tuple(i + 1 for i in counterparts(kept, layers))
            ends = ((*inner, layers) for inner in itertools.combinations(range(1, layers), n - 1))
            assert cost(found) == min(map(cost, ends))


def test_the_text_encoder_is_not_trained_along(tmp_path, monkeypatch):
    """The target keeps its own: a transformer trained together with another would not fit."""
    pipe, seen = Pipeline.from_pretrained("mini"), []
    before = {name: value.clone() for name, value in pipe.text.state_dict().items()}
    original = healing_module.fit

    def watched(loss, parameters, *others, **options):
        seen.append(sum(p.numel() for p in parameters))
        return original(loss, parameters, *others, **options)

    monkeypatch.setattr(healing_module, "fit", watched)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **options: pipe)
    prune_folder("mini", tmp_path / "out", by="indices", indices=KEPT, heal=QUICK)
    assert seen == [sum(w.numel() for w in load_transformer(tmp_path / "out" / "transformer").parameters())]
    assert same(pipe.text.state_dict(), before)


@pytest.mark.parametrize("data", ["scenes", "samples"])
def test_every_part_is_loaded_once(tmp_path, monkeypatch, data):
    """The pipeline, the transformer of source and target, the autoencoder, the text encoder; nothing of training is written."""
    loads, written = Counter(), []

    def counting(owner, name):
        original = getattr(owner, name)

        def counted(*args, **options):
            loads[owner.__name__.split(".")[-1]] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, staticmethod(counted) if isinstance(owner, type) else counted)

    for owner in (Pipeline, Autoencoder, MiniTextEncoder):
        counting(owner, "from_pretrained" if owner is Pipeline else "load")
    weights = transformer_checkpoint.load_weights
    monkeypatch.setattr(
        transformer_checkpoint, "load_weights", lambda *a: (loads.update(transformer=1), weights(*a))[1]
    )
    monkeypatch.setattr(training, "save", lambda *args: written.append(args))
    heal = replace(QUICK, data=data)
    prune_folder("mini", tmp_path / "out", indices=KEPT, count=2, sampling_steps=1, heal=heal)
    assert loads == {"Pipeline": 1, "transformer": 2, "Autoencoder": 1, "MiniTextEncoder": 1}
    assert not written


def test_an_interrupted_healing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning_files, "heal_on_scenes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_folder("mini", tmp_path / "out", by="indices", indices=KEPT, heal=QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["prune", "importance"])
def test_what_the_commands_measure_on(tmp_path, monkeypatch, command):
    """--count, --seed, --steps and --batch-size reach the calibration; pruning's record names them."""
    seen = []
    module = {"prune": pruning_files, "importance": importance_report}[command]
    original = module.calibration

    def watched(pipe, prompts, **options):
        seen.append((list(prompts), {name: value for name, value in options.items() if value is not None}))
        return original(pipe, prompts, **options)

    monkeypatch.setattr(module, "calibration", watched)
    numbers = ["--count", "3", "--seed", "5", "--steps", "2", "--batch-size", "2"]
    target = str(tmp_path / "out")
    rest = ["mini", target, "--keep", "11"] if command == "prune" else ["mini", "--out", target, "--no-loss"]
    assert main([command, *rest, *numbers]) == 0
    wanted = calibration_prompts(Pipeline.from_pretrained("mini"), None, 3, 5)
    assert seen == [(wanted, {"steps": 2, "seed": 5, "batch_size": 2})]
    if command == "prune":
        record = json.loads((tmp_path / "out" / "sana15.json").read_text())["pruning"]
        assert record["seed"] == 5
        assert record["calibration"] == {"prompts": None, "count": 3, "steps": 2}


def test_prompts_from_a_file_are_recorded_as_they_were_counted(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\ntwo blue stars\n")
    prune_folder("mini", tmp_path / "out", keep=11, prompts=path, count=100, sampling_steps=1)
    record = json.loads((tmp_path / "out" / "sana15.json").read_text())["pruning"]
    assert record["calibration"] == {"prompts": str(path), "count": 2, "steps": 1}


@pytest.mark.parametrize("kept", [[3], [3, 9]])
def test_few_blocks_are_healed_too(tmp_path, kept):
    """The rate has a limit: without one the loss of 1 or 2 blocks of 12 grew a thousandfold."""
    prune_folder("mini", tmp_path / "plain", indices=kept)
    prune_folder("mini", tmp_path / "healed", indices=kept, heal=Healing(12, batch_size=4))
    pipe = Pipeline.from_pretrained("mini")
    (batch, *_) = sana15.calibration(pipe, ["a red circle", "two blue stars"], steps=2)
    plain, healed = (
        batch_loss(load_transformer(tmp_path / name / "transformer"), batch).mean() for name in ("plain", "healed")
    )
    assert healed < plain


def test_search_and_learned_get_the_models_flow_shift(tmp_path, monkeypatch):
    seen = {}

    def search(model, batches, keep, **options):
        seen.update(options)
        return Choice(list(range(keep)), "search", {}, [11, 10, 9, 8])

    monkeypatch.setattr(pruning_search, "search", search)
    assert main(["prune", "mini", str(tmp_path / "out"), "--keep", "8", "--by", "search", "--count", "1",
                 "--steps", "2", "--candidates", "3", "--trial-steps", "7"]) == 0  # fmt: skip
    assert seen == {
        "flow_shift": Pipeline.from_pretrained("mini").flow_shift,
        "seed": 0,
        "candidates": 3,
        "trial_steps": 7,
    }
    assert seen["flow_shift"] != 3.0
    assert json.loads((tmp_path / "out" / "sana15.json").read_text())["pruning"]["removed"] == [11, 10, 9, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "8", "--candidates", "3"], "--candidates belongs to --by search"),
        (["--keep", "8", "--by", "search", "--rank", "3"], "--rank belongs to --by learned"),
        (["--keep", "8", "--distill", "1"], "--distill belongs to --heal"),
        (["--keep", "8", "--heal-on", "samples"], "--heal-on belongs to --heal"),
        (["--keep", "8", "--heal-batch", "2"], "--heal-batch belongs to --heal"),
        (["--keep", "8", "--heal-lr", "1e-3"], "--heal-lr belongs to --heal"),
        (["--indices", "0,1", "--heal", "--heal-batch", "0"], "at least one step of one picture"),
        (["--indices", "0,1", "--heal", "--heal-lr", "nan"], "lr must be above 0 and finite, got nan"),
        (["--indices", "0,1", "--prompts", "test", "--heal"], "nothing is measured"),
        (["--indices", "0,1", "--by", "indices", "--heal", "0"], "at least one step"),
        (["--indices", "0,1", "--by", "indices", "--heal", "--distill", "-1"], "distill must be at least 0"),
        (["--indices", "0,1", "--heal", "--distill", "inf"], "distill must be at least 0 and finite, got inf"),
        (["--keep", "12", "--heal"], "all 12 blocks are kept: there is nothing to heal"),
        (["--indices", "0,1,2,3,4,5,6,7,8,9,10,11", "--heal"], "there is nothing to heal"),
    ],
    ids=str,
)
def test_bad_options(options, message, tmp_path, capsys):
    assert main(["prune", "mini", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_transformer_alone_cannot_be_healed(tmp_path, capsys):
    source = str(MINI / "transformer")
    assert main(["prune", source, str(tmp_path / "out"), "--by", "indices", "--indices", "0,1", "--heal"]) == 2
    assert "cannot be healed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["transformer.teacher=X"], "belong together"),
        (["transformer.distill=1"], "belong together"),
        (["transformer.flow_weight=0"], "flow_weight must be above 0, or 0 beside"),
        (["transformer.noises=0"], "noises must be at least 1"),
        (["transformer.export=fp8"], "export must be one of fp32, bf16, fp16"),
        ([f"transformer.teacher={MINI}", "transformer.distill=1"], "needs a pruned transformer.start"),
        (
            [f"transformer.teacher={MINI}", "transformer.distill=1", f"transformer.start={MINI}"],
            "which blocks were kept",
        ),
    ],
)
def test_bad_training_options(options, message, tmp_path):
    base = [f"out={tmp_path / 'run'}", "steps=1", "batch_size=1", f"transformer.autoencoder={MINI / 'vae'}"]
    with pytest.raises((ValueError, DataError), match=message):
        training.train(load_config(None, [*base, *options]))
