"""The parts of the main process, each for one purpose; steerd.daemon puts them together. Those with a method `keep`
see to it for ever, in the event loop, that what they are for stays as it should be."""
