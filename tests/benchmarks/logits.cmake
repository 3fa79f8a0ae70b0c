# Adds logits.cpp to llama.cpp's own build, which includes this file by CMAKE_PROJECT_INCLUDE.
if(PROJECT_NAME STREQUAL "llama.cpp")
    set(LOGITS_SOURCE "${CMAKE_CURRENT_LIST_DIR}/logits.cpp")
    cmake_language(DEFER CALL add_executable llama-logits "${LOGITS_SOURCE}")
    cmake_language(DEFER CALL target_link_libraries llama-logits PRIVATE llama)
endif()
