"""What a kernel must not do."""


class Fault(RuntimeError):
    """A kernel did what a GPU would forbid, or would answer with something undefined."""


class UnknownInstruction(Fault):
    """An instruction that this interpreter has no meaning for; its text is the message."""
