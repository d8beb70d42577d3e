"""The errors a user may see. Every message says what was expected, what was received and what to do next.

The translation into the server's exception happens once, in ``infers`` and ``trainers``. Messages carry no patient
data: file names and identifiers stay out of them.
"""


class AppError(Exception):
    """Base of all errors that are the caller's or the installation's to fix."""


class PromptError(AppError):
    """A click, box, stroke or option that cannot be used as given."""


class VolumeError(AppError):
    """An image that cannot be read or segmented: missing, broken, empty, wrong dimension, not finite."""


class GridError(VolumeError):
    """A label that does not lie on its image's grid."""


class ConfigError(AppError):
    """A wrong ``--conf`` value, YAML key, or name of a backbone or method."""


class WeightsError(AppError):
    """Weights that are missing, incomplete, unverified, or belong to another architecture."""


class CapacityError(AppError):
    """A request that does not fit the memory or size limits."""
