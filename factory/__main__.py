"""`python -m factory` is the command `factory`."""

from factory.cli import main

if __name__ == "__main__":
    main()
