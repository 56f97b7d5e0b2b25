"""From files, globs, data sets and the storybook to a stream of documents."""
