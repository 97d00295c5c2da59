"""What goes wrong on the user's side, as exceptions: the message is one line that names the thing and the way out."""


class UserError(ValueError):
    """A file, a model, an option or a service does not do what was asked; the command prints the message alone."""


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded or converted as it is; the message names file and tensor."""
