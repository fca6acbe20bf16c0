"""The first version that Alembic knows of. Optuna made these tables; we begin with them."""

revision = "v0.9.0.a"
down_revision = None


def upgrade() -> None:
    """Nothing to do, and never run: a database without tables gets those of the latest version."""
