"""Training a model of a few thousand weights: from nothing to a folder, on from an interrupt; the folder is what was trained."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra train")
pytest.importorskip("transformers", reason="training needs the extra train")
pytest.importorskip("sentencepiece", reason="training needs the extra train")

from PIL import Image

from models.scenes import CLASSES, PROMPT, SPLITS, caption, scene
from models.training import __main__ as command
from models.training import answers, blocks, curves, export, fused, language, loop, pool, stages, tower
from models.training.recipe import Pace, Recipe, Sizes, TrainingError
from models.training.vocabulary import Vocabulary
from models.training.work import Work

SIZES = Sizes(tower_width=32, tower_heads=2, tower_ffn=48, tower_layers=3, width=32, heads=2, ffn=40, layers=2, positions=512, pieces=400)
RECIPE = Recipe(
    seed=3,
    scenes=24,
    development=4,
    sizes=SIZES,
    tower=Pace(samples=24, batch=8, rate=1e-3, decay=0.05),
    language=Pace(samples=32, batch=4, rate=1e-3, decay=0.05, muon=True),
)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 throughout, short answers, and torch's threads as they were."""
    for module in (blocks, tower, language):
        monkeypatch.setattr(module, "compute_type", lambda device: torch.float32)
    monkeypatch.setattr(answers, "LONGEST", 8)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(folder, recipe=RECIPE, until="export", shared=None, every=1e9):
    stages.run(folder, shared, recipe, until, 1, "cpu", every)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A work folder that all stages have been through."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        for module in (blocks, tower, language):
            patch.setattr(module, "compute_type", lambda device: torch.float32)
        patch.setattr(answers, "LONGEST", 8)
        run(folder)
    return folder


def test_the_folder_computes_what_was_trained(done):
    from transformers import LlavaForConditionalGeneration

    words = Vocabulary(done / "tokenizer.model")
    llava = LlavaForConditionalGeneration.from_pretrained(done / "llava").eval()
    assert llava.config.vision_feature_layer == -2 and llava.config.vision_feature_select_strategy == "default"
    view = scene(SPLITS["development"])
    answer = torch.tensor(words.answers([caption(view, 0)]))
    before, after = words.prompt()
    ids = torch.cat([torch.tensor([*before, *[words.image] * SIZES.grid**2, *after])[None], answer], 1)
    with torch.no_grad():
        theirs = llava(input_ids=ids, pixel_values=tower.pixels(torch.from_numpy(view.picture[None]))).logits
        trained = language.load(Work(done), Work(done), SIZES)
        features = np.load(done / "features-development.npy")[:1]
        rows = language.Speaker(trained, words)(torch.from_numpy(features).float(), answer)
        ours = rows @ trained.lm_head.weight.t()
    # features are kept as float16: half a unit in the last place of their largest entry, through a few layers
    assert (theirs[:, -answer.shape[1] - 1 : -1] - ours).abs().max() < 2e-3 * theirs.abs().max()


def test_the_tower_s_features_are_transformers_hidden_states(done):
    clip = tower.load(done / "tower.safetensors", SIZES)
    pictures = torch.from_numpy(np.stack([scene(i).picture for i in range(2)]))
    with torch.no_grad():
        theirs = clip(tower.pixels(pictures), output_hidden_states=True).hidden_states[-2]
        assert (tower.feature_rows(clip, pictures, torch.float32) - theirs).abs().max() < 1e-5


def test_a_processor_makes_the_trained_ids_and_pixels(done):
    from transformers import AutoProcessor

    processor, words = AutoProcessor.from_pretrained(done / "llava"), Vocabulary(done / "tokenizer.model")
    view = scene(5)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(text=text, images=Image.fromarray(view.picture), return_tensors="pt")
    before, after = words.prompt()
    assert made.input_ids[0].tolist() == [*before, *[words.image] * SIZES.grid**2, *after]
    assert (made.pixel_values - tower.pixels(torch.from_numpy(view.picture[None]))).abs().max() < 1e-6


@pytest.mark.parametrize("text", ["héllo  wörld\n\n😀 12345", "", "  two  spaces ", *(caption(scene(i), i) for i in range(20))])
def test_both_tokenizers_agree(done, text):
    words = Vocabulary(done / "tokenizer.model")
    ids = words.pieces.encode(text)
    assert export.tokenizer(words).encode(text).ids == [words.bos, *ids]
    joined = words.pieces.encode(f"{PROMPT} ASSISTANT: {text}")
    if text[:1].isalpha():  # the answer's ids do not depend on what stands before it
        assert joined == [*words.pieces.encode(f"{PROMPT} ASSISTANT:"), *ids]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, steps):
    """The loop stops before step number `steps`, as if the machine had been switched off; then it is itself again."""
    step = loop.Loop._step

    def failing(self, n):
        if n == steps:
            raise Interrupted
        return step(self, n)

    monkeypatch.setattr(loop.Loop, "_step", failing)
    return lambda: monkeypatch.setattr(loop.Loop, "_step", step)


def same_tensors(a, b):
    from safetensors.torch import load_file

    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_goes_on_as_if_it_had_not_been_interrupted(done, tmp_path, monkeypatch):
    (tmp_path / "pool").symlink_to(done / "pool")
    for stage, steps in (("tower", 2), ("language", 5)):
        restore = interrupt_after(monkeypatch, steps)
        with pytest.raises(Interrupted):
            run(tmp_path, every=0)
        restore()
        assert (tmp_path / f"{stage}.checkpoint").exists()
        with pytest.raises(TrainingError, match="other settings"):
            run(tmp_path, replace(RECIPE, seed=4))
    run(tmp_path)
    for name in ("tower.safetensors", "language.safetensors"):
        assert same_tensors(tmp_path / name, done / name)
    assert not list(tmp_path.glob("*.checkpoint")) and not list(tmp_path.glob("*.part*"))


def test_another_seed_shares_the_tower(done, tmp_path):
    run(tmp_path, replace(RECIPE, seed=4, language=replace(RECIPE.language, samples=8)), shared=done)
    assert not same_tensors(tmp_path / "language.safetensors", done / "language.safetensors")
    assert (tmp_path / "llava" / "config.json").exists() and not (tmp_path / "tower.safetensors").exists()


def test_log_answers_and_curves(done):
    lines = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "language"] == list(range(1, 9))
    told = [json.loads(line) for line in (done / "answers.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in told] == [f"development-{i:05d}" for i in range(4)]
    with Image.open(done / "curves.png") as picture:
        assert min(picture.size) > 500 and len(picture.convert("L").getcolors()) > 10


def test_figures_of_reference_captions_are_perfect():
    views = [scene(SPLITS["development"] + i) for i in range(50)]
    assert answers.figures([caption(view, 1) for view in views], views) == {
        "recall": 1.0,
        "precision": 1.0,
        "captions_with_invented": 0.0,
        "sides": 1.0,
    }
    swapped = answers.figures([caption(view, 1).replace("left", "x").replace("right", "left") for view in views], views)
    assert swapped["sides"] < 0.2
    shifted = answers.figures([caption(view, 1) for view in views[1:]], views[:-1])
    assert shifted["recall"] < 0.5 and shifted["captions_with_invented"] > 0.8


def test_patch_labels_count_pixels():
    view = scene(11)
    kinds, shares = pool.patch_labels(view, 14)
    for i, (kind, share) in enumerate(zip(kinds, shares, strict=True)):
        y, x = divmod(i, 8)
        seen = [1 + view.objects[v - 1].kind if v else 0 for v in view.visible[y * 14 : y * 14 + 14, x * 14 : x * 14 + 14].ravel()]
        counts = {k: seen.count(k) for k in set(seen) - {0}}
        assert share == np.float16(max(counts.values(), default=0) / 196)
        assert counts.get(kind, 0) == max(counts.values(), default=0)
    assert kinds.max() <= len(CLASSES)


def test_an_epoch_reads_each_scene_once_and_little_padding(done):
    words, work = Vocabulary(done / "tokenizer.model"), Work(done)
    reading = language.Reading.of(work, pool.Pool(work, RECIPE), "train", words, 24)
    plan = language.Plan(reading, 3, 4)
    epochs = [np.concatenate(plan.epoch(e)) for e in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(24))
    assert (epochs[0] != epochs[1]).any()
    lengths = reading.lengths(0)
    padded = sum(len(batch) * lengths[batch].max() for batch in plan.epoch(0))
    assert padded < 1.1 * lengths.sum()
    first, second = (reading.batch(np.arange(24), epoch, torch.device("cpu"))[1] for epoch in (0, 1))
    assert first.shape != second.shape or not torch.equal(first, second)  # other words


def test_a_small_model_learns_a_few_captions_by_heart(done):
    words, work = Vocabulary(done / "tokenizer.model"), Work(done)
    reading = language.Reading.of(work, pool.Pool(work, RECIPE), "train", words, 4)
    torch.manual_seed(0)
    speaker = language.Speaker(language.LlavaForConditionalGeneration(language.config(SIZES, words)), words)
    learn = loop.optimizers(speaker, replace(RECIPE.language, rate=1e-2))
    batch = reading.batch(np.arange(4), 0, torch.device("cpu"))
    losses = []
    for _ in range(60):
        losses.append(language.loss(speaker, *batch))
        speaker.zero_grad()
        losses[-1].backward()
        for one in learn:
            one.step()
    assert losses[0] > 5.5 and losses[-1] < 1.5


def test_muon_has_the_matrices_inside_layers(done):
    words = Vocabulary(done / "tokenizer.model")
    speaker = language.Speaker(language.LlavaForConditionalGeneration(language.config(SIZES, words)), words)
    adam, muon = loop.optimizers(speaker, RECIPE.language)
    shapes = [[tuple(p.shape) for group in one.param_groups for p in group["params"]] for one in (adam, muon)]
    assert len(shapes[1]) == 7 * SIZES.layers and (words.rows, SIZES.width) not in shapes[1]
    assert sum(map(len, shapes)) == len(list(speaker.parameters()))
    assert len(loop.optimizers(speaker, replace(RECIPE.language, muon=False))) == 1


def test_errors_name_the_file(done, tmp_path, monkeypatch):
    (tmp_path / "pool").symlink_to(done / "pool")
    (tmp_path / "tower.checkpoint").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match=r"tower\.checkpoint: not a checkpoint"):
        run(tmp_path)
    with pytest.raises(TrainingError, match=r"train-000000000\.npz: holds 24 scenes, not 30"):
        run(tmp_path, replace(RECIPE, scenes=30), until="tower")
    with pytest.raises(TrainingError, match="other sizes"):
        run(tmp_path, replace(RECIPE, sizes=replace(SIZES, patch=28)))
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="made from other scenes"):
        patch.setattr(pool, "caption", lambda view, variant: "Other words.")
        run(tmp_path)
    with pytest.raises(TrainingError, match=r"has no tower\.safetensors"):
        run(tmp_path / "seed", shared=tmp_path)
    with pytest.raises(TrainingError, match=r"tower\.safetensors: not of a model of these sizes"):
        tower.load(done / "tower.safetensors", replace(SIZES, tower_width=64))
    (tmp_path / "log.jsonl").write_text('{"stage": "tower", "step": 1}\n{"sta')
    with pytest.raises(TrainingError, match=r"log\.jsonl:2: "):
        curves.make(Work(tmp_path), Work(tmp_path))


def test_command_line_errors(tmp_path, capsys):
    assert command.main([str(tmp_path / "w"), "--samples", "0"]) == 1
    assert command.main([str(tmp_path / "w"), "--device", "nonsense"]) == 1
    (tmp_path / "file").write_text("")
    assert command.main([str(tmp_path / "file")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_the_fused_parts_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x: fused.normed(x, 1e-5, torch.float64), (x,))
    assert check(fused.gated, (x,))
    wide = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    turn = blocks.rotations(3, 4, 10000.0, torch.device("cpu"), torch.float64)
    for angles in (None, turn):
        assert check(lambda x, angles=angles: fused.heads(x, 2, angles), (wide,))
