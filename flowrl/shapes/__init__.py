"""The embedded world: captioned scenes of coloured shapes, their renderer and their exact
verifier.
"""
