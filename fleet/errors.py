"""What can go wrong, by whom it is mended."""

# Begins the message of a run that settings, data or weights keep from beginning. Flower
# passes on an error's text alone: by this a server knows that trying again is no use.
CANNOT_BEGIN = "the run cannot begin: "
# Begins the message of a run that has waited for clients in vain: trying again is of use.
TOO_FEW = "too few clients came: "


class FleetError(Exception):
    """Base of every error that this project raises on purpose.

    The message names the thing, both values and the way out; command lines
    print it without a traceback.
    """


class ConfigError(FleetError):
    """A setting, a data source or a weights file that the user can mend."""


class PlanError(FleetError):
    """An update plan that the backbone cannot carry out."""


class UpdateError(FleetError):
    """A state or an update that does not match the plan it claims."""


class CheckpointError(FleetError):
    """A checkpoint that cannot be written, read, or gone on from."""
