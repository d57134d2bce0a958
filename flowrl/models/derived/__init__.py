"""A base model derived from any rectified-flow pipeline of diffusers: no family is named here.

The pipeline's own call is the model. A stand-in takes its scheduler's place (`standin`), gives the
loop one time, and ends it at the first step, where all conventions already agree: what a scheduler
is handed is noise minus data, whatever the network's sign, clock, packing or guidance. Texts and
the state's companions are recorded once (`recording`, `trees`) and replayed. `adapter` makes a
`FlowModel` of this, and `parity` is the check that stands between an unknown pipeline and training.
"""
