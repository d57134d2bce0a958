"""Small random pipelines of the real classes, by family: what nobody has the weights of can still
be built, sampled and trained on a laptop.
"""

from families.edits import EDITS
from families.flux import FLUX
from families.images import IMAGES
from families.refused import REFUSED
from families.videos import VIDEOS

FAMILIES = FLUX | IMAGES | EDITS | VIDEOS | REFUSED
"""Every family by its name."""
