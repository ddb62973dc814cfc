"""The fake adapter folders, by the name that the serving tests import."""

from tests.support.adapters import *  # noqa: F403
