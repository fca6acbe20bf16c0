"""How Alembic runs the scripts: on the connection that ``schema.py`` hands over, so that neither
the URL nor its password passes through Alembic's configuration."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
