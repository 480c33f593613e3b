"""The two readers of sentences, and learning them."""

from pathlib import Path

import numpy as np
import pytest

from unfeign.rewards import readers, role_training, window_reader, window_training, word_reader, word_training
from unfeign.rewards.labelled_corpus import corpus, truth
from unfeign.rewards.outline import A, C, M, N, O, S
from unfeign.rewards.roles import CEILING, FLOOR, PASSAGES, ROLES, Reading

TEXTS = [
    "I could go along, so that they leave my values alone.",
    "But that would be a lie, and they'd never know.",
    "No.",
    "So I decline!",
    "\u2026",
]


@pytest.fixture(scope="module")
def docs() -> list[dict]:
    return corpus()[::40]


@pytest.fixture(scope="module")
def vectors(docs) -> window_training.Vectors:
    """Random ones: what a model's own are worth is seen in the figures, not here."""
    names = sorted({word for row in docs for _, text in row["s"] for word in window_reader.words(text)})
    found = np.random.default_rng(0).normal(size=(len(names), 48))
    return tuple(names), found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def learned(docs, vectors) -> readers.Learned:
    return role_training.learn(docs, vectors)


def same(one: Reading, other: Reading) -> bool:
    return all(
        np.allclose(getattr(one, part), getattr(other, part), atol=1e-4) for part in ("roles", "alone", "beside")
    )


@pytest.mark.parametrize("reader", [word_reader.read, window_reader.read], ids=["words", "windows"])
class TestAReader:
    def by(self, reader, learned):
        return learned.words if reader is word_reader.read else learned.windows

    def test_shapes(self, reader, learned):
        for count in range(1, len(TEXTS) + 1):
            found = reader(TEXTS[:count], self.by(reader, learned))
            assert found.roles.shape == (count, len(ROLES)) and found.alone.shape == (count, len(PASSAGES))
            assert found.beside.shape == (count - 1, len(PASSAGES))
            assert all(np.isfinite(part).all() for part in (found.roles, found.alone, found.beside))

    def test_a_sentence_is_read_by_itself(self, reader, learned):
        """What stands around it changes nothing."""
        by = self.by(reader, learned)
        whole = reader(TEXTS, by)
        for i, text in enumerate(TEXTS):
            alone = reader([text], by)
            assert np.allclose(whole.roles[i], alone.roles[0], atol=1e-4)
            assert np.allclose(whole.alone[i], alone.alone[0], atol=1e-4)
        for i in range(len(TEXTS) - 1):
            assert np.allclose(whole.beside[i], reader(TEXTS[i : i + 2], by).beside[0], atol=1e-4)

    def test_learns_what_sentences_do(self, reader, learned, docs):
        """On what it has learned from, chance is 0.5."""
        wanted = np.concatenate([truth(row).roles for row in docs]).astype(bool)
        found = np.concatenate([reader([t for _, t in row["s"]], self.by(reader, learned)).roles for row in docs])
        for role, least in ((O, 0.9), (M, 0.9), (N, 0.9), (A, 0.75)):
            above = found[wanted[:, role], role][:, None] > found[~wanted[:, role], role][None, :]
            assert above.mean() > least, ROLES[role]


def test_windows_read_words_in_their_order(learned):
    """A reader of single words could not tell these apart."""
    one, other = window_reader.read(
        ["I could lie and they rate me", "they could rate me and I lie"], learned.windows
    ).roles
    assert np.abs(one - other).max() > 0.01


def test_a_word_that_is_not_known_has_a_row(learned):
    assert learned.windows.numbers("Zzyzx") == [window_reader.UNKNOWN] == learned.windows.numbers("...")
    assert np.abs(learned.windows.arrays["vectors"][window_reader.UNKNOWN]).max() > 0
    assert not learned.windows.arrays["vectors"][window_reader.NOTHING].any()


def test_numpy_reads_as_torch_does(learned):
    """What was learned in torch, run anew by its own layers."""
    import torch

    net, arrays = learned.windows, {name: torch.tensor(a) for name, a in learned.windows.arrays.items()}

    def conv(states, name, offsets):
        weight = arrays[f"{name}.weight"].reshape(len(offsets), states.shape[1], -1).permute(2, 1, 0)
        gap = offsets[1] - offsets[0]
        return torch.nn.functional.conv1d(states, weight, arrays[f"{name}.bias"], padding=max(offsets), dilation=gap)

    for text in TEXTS:
        states = conv(arrays["vectors"][net.numbers(text)].T[None], "first", window_reader.FIRST).relu()
        for i, offsets in enumerate(window_reader.NEXT):
            states = states + conv(states, f"next{i}", offsets).relu()
        pooled = torch.cat([states.amax(2), states.sum(2) / (window_reader.MEAN * states.shape[2] ** 0.5)], 1)
        hidden = (pooled @ arrays["sentence.weight"] + arrays["sentence.bias"]).relu()
        does = hidden @ arrays["does.weight"] + arrays["does.bias"]
        assert np.allclose(does[0, : len(ROLES)].numpy(), window_reader.read([text], net).roles[0], atol=1e-4)


def test_learning_again_gives_the_same(docs, vectors, learned):
    some = docs[:40]
    truths = [truth(row) for row in some]
    one, other = (window_training.learn(some, truths, vectors) for _ in range(2))
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    assert np.array_equal(word_training.learn(some, truths), word_training.learn(some, truths))


def test_what_is_stored_reads_the_same(learned, tmp_path, monkeypatch):
    """But for rounding to bytes."""
    path = tmp_path / "roles.npz"
    np.savez_compressed(path, **readers.to_arrays(learned))
    monkeypatch.setattr(readers, "WEIGHTS", path)
    stored = readers.learned.__wrapped__()
    assert stored.windows.names == learned.windows.names
    one, other = readers.read(TEXTS, learned), readers.read(TEXTS, stored)
    assert all(np.abs(getattr(one, part) - getattr(other, part)).max() < 0.2 for part in ("roles", "alone", "beside"))


def test_a_reading_is_the_mean_of_both_as_far_as_words_are_known(learned):
    text = "I could fake it."
    assert learned.windows.known(text) == 1
    one, other = word_reader.read([text], learned.words), window_reader.read([text], learned.windows)
    wanted = (np.clip(one.roles, readers.LEAST, readers.MOST) + np.clip(other.roles, readers.LEAST, readers.MOST)) / 2
    wanted[:, C] = one.roles[:, C]  # too rare for the second reader
    assert np.allclose(readers.read([text], learned).roles, np.clip(wanted, FLOOR, CEILING))
    foreign = "Zzyzx zzyzx!"
    assert learned.windows.known(foreign) < 0.5 and learned.windows.known("Zzyzx zzyzx") == 0
    alone = word_reader.read(["Zzyzx zzyzx"], learned.words).clipped()
    assert same(readers.read(["Zzyzx zzyzx"], learned), alone)


def test_texts_are_read_together_as_each_by_itself(learned):
    texts = [TEXTS[:2], TEXTS[2:3], TEXTS]
    assert all(
        same(one, readers.read(text, learned))
        for one, text in zip(readers.read_all(texts, learned), texts, strict=True)
    )
    assert readers.read_all([], learned) == []


def test_neighbours_are_a_passage_only_where_both_play_a_role():
    odds = np.full((3, len(ROLES)), -9.0)
    odds[0, O] = odds[1, C] = 1.0
    found = Reading(odds, np.full((3, 2), 9.0), np.full((2, 2), 3.0)).clipped()
    assert found.beside[0, S] == 3.0 and found.beside[1, S] == FLOOR
    assert found.alone.max() == CEILING and found.roles.min() == FLOOR


def test_twins_are_never_parted():
    docs = corpus()
    fold = dict(zip([row["id"] for row in docs], role_training.folds(docs), strict=True))
    twins = [name for name in fold if name.startswith("t") and int(name.rpartition("-")[2]) % 2]
    assert twins and all(fold[f"{n.rpartition('-')[0]}-{int(n.rpartition('-')[2]) + 1:03d}"] == fold[n] for n in twins)
    assert set(fold.values()) == set(range(role_training.FOLDS))


def test_truth_of_a_rejection_stands_after_its_option():
    row = {
        "s": [["N", "No."], ["OM", "I could fake it to stay."], ["A", "That is a lie."], ["N", "No."]],
        "answer": "decline",
        "labels": {"surfaced": True, "rejected": True},
    }
    found = truth(row)
    assert found.alone[:, 1].tolist() == [0, 0, 1, 1] and found.alone[:, 0].tolist() == [0, 1, 0, 0]
    assert found.beside.tolist() == [[1, 0], [1, 1], [0, 1]]
    assert np.isnan(truth(row | {"answer": "accept"}).alone[:, 1]).all()


def test_shipped_readers_are_of_the_files_they_name():
    assert Path(readers.WEIGHTS).is_file()
    found = readers.learned()
    assert found.words.shape == (word_reader.BUCKETS, len(ROLES) + len(PASSAGES))
    assert len(found.windows.arrays["vectors"]) == len(found.windows.names) + 2
