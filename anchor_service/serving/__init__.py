"""The served application: a trained generator and its anchors behind HTTP."""
