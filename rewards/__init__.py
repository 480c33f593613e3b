"""What a transcript is worth: a judge gives a verdict, a reward turns it into terms, credit says which tokens earn
them.

Read in this order: `verdict`, `judge`, `rules`, `terms`, `verbalized_rejection`, `comparators`, `credit`, `plugin`.
"""
