"""Losses, reverse ones of `LossInputs` and forward ones of `ForwardInputs`, and the reference
penalty.
"""
