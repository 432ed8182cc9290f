"""`python -m flame_jax.server`."""

from flame_jax.server.app import main

if __name__ == "__main__":
    main()
