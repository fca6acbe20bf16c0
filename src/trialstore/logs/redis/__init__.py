"""A journal in Redis; ``log.py`` says what a crash may leave behind, and why nothing is lost."""

from trialstore.logs.redis.log import RedisLog

__all__ = ["RedisLog"]
