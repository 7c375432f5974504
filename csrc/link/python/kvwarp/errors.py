"""What is raised: every refusal names the argument at fault."""


class Error(ValueError):
    """An argument that an op does not take. `argument` is its name, `status` the kvw_status where the library refused."""

    def __init__(self, argument, why, status=None):
        super().__init__(f"{argument}: {why}")
        self.argument, self.why, self.status = argument, why, status


class VersionError(Error, ImportError):
    """Library, header and package are not of one version."""
