"""What goes wrong on the way to the machines, as far as a user can mend it."""


class LaunchError(RuntimeError):
    """A command could not be started or submitted; says in one line what to do."""
