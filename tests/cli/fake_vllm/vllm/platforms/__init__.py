"""A platform that is known."""


class Platform:
    def is_unspecified(self):
        return False


current_platform = Platform()
