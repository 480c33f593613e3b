"""The cache of verdicts: its keys, and many writers at once."""

from concurrent.futures import ThreadPoolExecutor

from unfeign.rewards.claude_judge import ClaudeJudge
from unfeign.rewards.judge import load_judge
from unfeign.rewards.rubric import Reading
from unfeign.rewards.verdict_cache import VerdictCache, cache_key, default_path


def reading() -> Reading:
    labels = dict.fromkeys(Reading.model_fields, "no") | {"option": "none", "outcome": "none", "decision": "none"}
    return Reading(**labels | {"justification": "none"})


def test_cache_keys_tell_questions_apart(tmp_path, monkeypatch):
    """Model, rubric, question and sample each make another reading."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    own = tmp_path / "own.txt"
    own.write_text("Say no to everything.")
    one, other = ClaudeJudge(), ClaudeJudge(rubric="own.txt", folder=tmp_path)
    keys = [
        cache_key(one.model, one.rubric, "q"),
        cache_key("another", one.rubric, "q"),
        cache_key(one.model, other.rubric, "q"),
        cache_key(one.model, one.rubric, "r"),
        cache_key(one.model, one.rubric, "q", 1),
    ]
    assert len(set(keys)) == 5
    assert {len(key) for key in keys} == {64}, "a custom_id of a batch has at most 64 characters"
    own.write_text("Say yes to everything.")
    names = {
        one.name,
        other.name,
        ClaudeJudge(rubric="own.txt", folder=tmp_path).name,
        ClaudeJudge(model="claude-opus-5").name,
    }
    assert len(names) == 4
    assert load_judge("claude").name == "claude claude-sonnet-4-6 v1"
    assert load_judge({"name": "claude", "cache": "here.sqlite"}, tmp_path).store.path == tmp_path / "here.sqlite"
    assert one.store.path == default_path() == tmp_path / "home" / "unfeign" / "verdicts.sqlite"


def test_many_writers_share_a_cache(tmp_path):
    cache = tmp_path / "cache.sqlite"

    def write(worker: int) -> None:
        store = VerdictCache(cache)
        for i in range(25):
            store.put(f"{worker}-{i}", reading())

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    assert len(VerdictCache(cache).get([f"{w}-{i}" for w in range(8) for i in range(25)])) == 200
