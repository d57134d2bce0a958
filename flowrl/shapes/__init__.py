"""The embedded world has captioned scenes of coloured shapes, their renderer and their exact
verifier.
"""
