"""Where the commands `factory` and `python -m factory` begin."""


def main() -> None:
    """Load the command line and run it; Ctrl-C before it can answer is no traceback."""
    try:
        from factory.cli.main import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
