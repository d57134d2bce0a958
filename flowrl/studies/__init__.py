"""Studies: many runs that answer one question, from `experiments/<study>/sweep.yaml` to the numbers
of its README.
"""
