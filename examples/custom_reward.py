"""A reward of your own in ten lines: TRL's signature, named in a config file as `custom_reward.py:brevity`.

The scenario's fields arrive as columns, one list each, and `words` comes from the config's `kwargs`.
"""


def brevity(prompts, completions, completion_ids, close_think, words=20, **columns):
    """1 for an answer of at most `words` words, falling as it grows; 0 where no answer follows the reasoning."""
    rewards = []
    for completion, close in zip(completions, close_think, strict=True):
        _, closed, answer = completion[0]["content"].partition(close)
        length = len(answer.split())
        rewards.append(min(1.0, words / length) if closed and length else 0.0)
    return rewards
