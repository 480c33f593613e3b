"""What the policy is asked: families of scenarios, matched pairs of tiers, controls, and the transcripts that come
back.
"""
