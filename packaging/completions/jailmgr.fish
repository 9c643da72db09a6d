# fish completion for jailmgr(1)

function __jailmgr_words --description 'The words before the cursor that are no options, without jailmgr'
    set -l skip 0
    for word in (commandline -opc)[2..]
        if test $skip = 1
            set skip 0
        else if contains -- $word @VALUED@
            set skip 1
        else if not string match -q -- '-*' $word
            echo $word
        end
    end
end

function __jailmgr_at --description 'Whether the words are just these'
    set -l words (__jailmgr_words)
    test "$words" = "$argv"
end

function __jailmgr_in --description 'Whether the words begin with these'
    set -l words (__jailmgr_words)
    test "$words[1..$(count $argv)]" = "$argv"
end

function __jailmgr_place --description 'Whether FIRST to LAST words follow these: FIRST LAST WORD...'
    set -l words (__jailmgr_words)
    set -l count (math (count $words) - (count $argv) + 2)
    __jailmgr_in $argv[3..]; and test $count -ge $argv[1] -a $count -le $argv[2]
end

function __jailmgr_jails
    jailmgr list --format csv 2>/dev/null | string replace -rf '^([^,]*),.*' '$1' | tail -n +2
end

function __jailmgr_templates
    printf '%s\n' @TEMPLATES@
    for folder in /etc/jailmgr/templates/*/
        path basename $folder
    end
end

function __jailmgr_keys
    printf "%s$argv\n" @KEYS@
end

complete -c jailmgr -f
@TABLE@
